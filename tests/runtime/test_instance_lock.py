"""Which process serves in a network namespace, and a successor whose predecessor dies during the hand-over."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from userspace_proxy.dataplane.handover import VERSION, Conversation, Incumbent, Present, Released, TakeOver, hand_over
from userspace_proxy.dataplane.rendezvous import Role, join
from userspace_proxy.errors import StartError
from userspace_proxy.runtime.instance_lock import end_orphans, take_lock


async def nobody(asked: TakeOver, conversation: Conversation) -> None:
    raise AssertionError("nobody asks")


async def test_workers_drain_if_their_control_process_dies_while_it_yields() -> None:
    """The workers answer as the dead process did, with its last state."""
    first = await take_lock(["a"], "auto", 1)

    async def die_once_all_is_given(asked: TakeOver, conversation: Conversation) -> None:
        await hand_over(conversation, [], first.name)
        conversation.close()  # as the kernel does for a process that was killed

    control = Incumbent(first.member, Present(VERSION, 1, ["a"]), die_once_all_is_given)
    successor = await take_lock(["a"], "auto", 1)
    control.close()
    member = join(Role.SERVES_ON)
    released = []

    async def make_way(asked: TakeOver, conversation: Conversation) -> None:
        await hand_over(conversation, [], first.name)
        released.append(asked.pid)
        conversation.send(Released())
        orphan.close()
        first.close()

    orphan = Incumbent(member, Present(VERSION, 2, orphan=True), make_way)
    await successor.taken()

    assert len(released) == 1
    successor.close()


@pytest.mark.parametrize("count", [0, 3, 260])
async def test_health_check_listeners_go_to_the_successor_however_many(count: int) -> None:
    first = await take_lock(["a"], "auto", 1)
    checks = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]

    async def give(asked: TakeOver, conversation: Conversation) -> None:
        assert asked.health_checks
        await hand_over(conversation, [], first.name, checks)
        conversation.send(Released())

    incumbent = Incumbent(first.member, Present(VERSION, 1, ["a"]), give)
    successor = await take_lock(["a"], "auto", 1)
    await successor.taken()

    assert [sock.getsockname() for sock in successor.health_checks] == [sock.getsockname() for sock in checks]
    assert successor.listeners == []
    incumbent.close()
    first.close()
    successor.close()
    for sock in (*checks, *successor.health_checks):
        sock.close()


async def test_two_starts_take_turns_and_the_second_finds_the_first() -> None:
    first = await take_lock(["a"], "auto", 1)
    incumbent = Incumbent(first.member, Present(VERSION, 4711, ["a"]), nobody)

    outcomes = await asyncio.gather(
        *(take_lock(["b"], "auto", 1) for _ in range(3)), end_orphans(), return_exceptions=True
    )

    assert [type(outcome) for outcome in outcomes] == [StartError] * 3 + [Present]
    assert all("(process 4711); it serves a; stop it first" in str(outcome) for outcome in outcomes[:3])
    incumbent.close()
    first.close()


async def test_an_instance_with_another_hand_over_version_is_left_alone() -> None:
    first = await take_lock(["a"], "auto", 1)
    incumbent = Incumbent(first.member, Present(VERSION + 2, 4711, ["a"], oldest=VERSION + 1), nobody)

    with pytest.raises(StartError, match=f"hands over in version {VERSION + 2} and this one takes over in {VERSION}"):
        await take_lock(["a"], "always", 1)
    incumbent.close()
    first.close()


async def test_a_silent_member_does_not_delay_a_start_for_ever() -> None:
    with join(Role.SERVES), pytest.raises(StartError, match=rf"\(process {os.getpid()}\) and does not answer"):
        await take_lock(["a"], "auto", 1)
