"""The private epoll: its guarantees when sockets are closed, handed over and watched again."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from tests.ends import until
from userspace_proxy.dataplane.poller import READ, WRITE, Poller

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
async def poller() -> AsyncIterator[Poller]:
    made = Poller(asyncio.get_running_loop())
    yield made
    made.stop()


@pytest.fixture
def pairs() -> Iterator[list[Pair]]:
    made = [socket.socketpair(type=socket.SOCK_STREAM | socket.SOCK_NONBLOCK) for _ in range(3)]
    yield made
    for pair in made:
        for sock in pair:
            sock.close()


async def test_a_descriptor_that_is_used_again_within_a_turn_gets_no_event_of_the_old_one(
    poller: Poller, pairs: list[Pair]
) -> None:
    (first, to_first), (second, to_second), _ = pairs
    seen: list[str] = []
    came: list[Pair] = []

    def replace(mine: socket.socket, other: socket.socket) -> None:
        """Both are readable in this turn: the first handler closes both, and a new socket gets a number of theirs."""
        seen.append("old")
        for sock in (mine, other):
            poller.close(sock)
        new = socket.socketpair(type=socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        came.append(new)
        poller.watch(new[0], lambda events: seen.append("read" if events & READ else "write"))

    poller.watch(first, lambda events: replace(first, second) if events & READ else None)
    poller.watch(second, lambda events: replace(second, first) if events & READ else None)
    await asyncio.sleep(0.01)
    to_first.send(b"x")
    to_second.send(b"x")
    await until(lambda: "write" in seen, "the new socket is told that it may write")

    assert seen == ["old", "write"]
    assert first.fileno() == second.fileno() == -1
    for sock in came[0]:
        sock.close()


async def test_a_new_handler_of_a_watched_socket_gets_all_current_events(poller: Poller, pairs: list[Pair]) -> None:
    (sock, far), *_ = pairs
    far.send(b"x")
    told: list[int] = []
    poller.watch(sock, told.append)
    await until(lambda: bool(told), "the first handler is told")

    anew: list[int] = []
    poller.watch(sock, anew.append)
    await until(lambda: bool(anew), "the second handler is told")

    assert anew[0] & READ
    assert anew[0] & WRITE


async def test_a_handler_that_takes_over_a_socket_gets_only_new_events(poller: Poller, pairs: list[Pair]) -> None:
    (sock, far), *_ = pairs
    told: list[int] = []
    poller.watch(sock, told.append)
    await until(lambda: bool(told), "the first handler is told")

    anew: list[int] = []
    poller.hand_over(sock, anew.append)
    await asyncio.sleep(0.01)
    assert not anew
    far.send(b"x")
    await until(lambda: bool(anew), "the second handler is told")

    assert anew[0] & READ
    assert len(told) == 1


async def test_a_closed_socket_that_another_process_holds_causes_no_events(poller: Poller, pairs: list[Pair]) -> None:
    """A tool that is being started holds all descriptors until exec."""
    (sock, far), *_ = pairs
    told: list[int] = []
    poller.watch(sock, told.append)
    await until(lambda: bool(told), "the handler is told")
    told.clear()
    with sock.dup():
        poller.close(sock)
        await until(lambda: sock.fileno() == -1, "it is closed")
        far.send(b"x")
        await asyncio.sleep(0.01)

    assert not told


async def test_closing_twice_is_closing_once(poller: Poller, pairs: list[Pair]) -> None:
    (sock, _), *_ = pairs
    poller.watch(sock, lambda events: None)
    poller.close(sock)
    poller.close(sock)
    await until(lambda: sock.fileno() == -1, "it is closed")

    poller.close(sock)


async def test_a_handler_that_fails_takes_no_event_from_the_others(
    poller: Poller, pairs: list[Pair], caplog: pytest.LogCaptureFixture
) -> None:
    (bad, _), (good, far), _ = pairs
    told: list[int] = []

    def fail(events: int) -> None:
        raise ValueError(events)

    poller.watch(bad, fail)
    poller.watch(good, told.append)
    await until(lambda: bool(told), "the good one is told")
    assert "a bug" in caplog.text

    told.clear()
    far.send(b"x")
    await until(lambda: bool(told), "and told again")


async def test_a_step_that_schedules_another_lets_other_work_run_between(poller: Poller, pairs: list[Pair]) -> None:
    (sock, far), *_ = pairs
    order: list[str] = []

    def step() -> None:
        order.append("step")
        if order.count("step") < 50:
            poller.again(step)

    poller.watch(sock, lambda events: order.append("event") if events & READ else None)
    await asyncio.sleep(0.01)
    far.send(b"x")
    poller.again(step)
    await until(lambda: order.count("step") == 50, "all steps are taken")

    assert order.index("event") < 5


async def test_bulk_that_begins_within_a_turn_of_other_bulk_takes_turns_with_it(
    poller: Poller, pairs: list[Pair]
) -> None:
    (sock, far), *_ = pairs
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["message"]))
    order: list[str] = []

    def bulk(name: str, steps: int) -> Callable[[int], bool]:
        def step(most_bytes: int) -> bool:
            order.append(name)
            if name == "long" and order.count("long") % 10 == 0:
                far.send(b"x")  # is seen before the next step
            return order.count(name) < steps

        return step

    poller.watch(sock, lambda events: poller.in_bulk(bulk("short", 5)) if events & READ else None)
    await asyncio.sleep(0.01)
    poller.in_bulk(bulk("long", 100))
    await until(lambda: order.count("long") == 100, "all steps are taken")
    await asyncio.sleep(0.01)

    assert order.count("short") > 5
    assert not complaints


@pytest.mark.parametrize(("messages_a_step", "expected"), [(0, "aaaabbbbaaaabbbb"), (1, "aabababababababb")])
async def test_bulk_moves_in_a_row_but_takes_single_steps_while_messages_move(
    poller: Poller, messages_a_step: int, expected: str
) -> None:
    order: list[str] = []

    def bulk(name: str) -> Callable[[int], bool]:
        def step(most_bytes: int) -> bool:
            order.append(name)
            poller.messages += messages_a_step
            return order.count(name) < 8

        return step

    poller.in_bulk(bulk("a"))
    poller.in_bulk(bulk("b"))
    await until(lambda: len(order) == 16, "all steps are taken")

    assert "".join(order) == expected


async def test_a_client_that_comes_during_bulk_is_accepted_between_two_steps(poller: Poller) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        order: list[str] = []

        def step(most_bytes: int) -> bool:
            order.append("step")
            if len(order) == 1:
                client.connect(listener.getsockname())
            return len(order) < 4

        def accept() -> None:
            order.append("client")
            listener.accept()[0].close()

        poller.accept_from(listener, accept)
        poller.in_bulk(step)
        await until(lambda: "client" in order, "the client is accepted")

        assert order.index("client") == 1
        poller.leave(listener)


async def test_while_accepting_is_paused_clients_wait_and_are_served_after_it(poller: Poller) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        listener.setblocking(False)
        accepted: list[socket.socket] = []
        poller.accept_from(listener, lambda: accepted.append(listener.accept()[0]))
        poller.pause_accepting()
        client.connect(listener.getsockname())
        await asyncio.sleep(0.05)
        assert not accepted
        assert not poller.accepting

        poller.resume_accepting()
        poller.resume_accepting()

        await until(lambda: bool(accepted), "the client is accepted")
        poller.leave(listener)
        poller.leave(listener)
        accepted[0].close()


async def test_a_poller_that_was_stopped_while_paused_is_not_resumed(poller: Poller) -> None:
    poller.pause_accepting()
    stopped = Poller(asyncio.get_running_loop())
    stopped.pause_accepting()
    stopped.again(lambda: pytest.fail("a step was taken after the stop"))
    stopped.stop()

    stopped.resume_accepting()
    await asyncio.sleep(0.01)

    assert not stopped.accepting
