"""Frames with descriptors over a unix socket."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from userspace_proxy.dataplane.channel import FRAME_MAX_BYTES, LOST, Channel, close_descriptors


@pytest.fixture
def room_for_descriptors() -> Iterator[Callable[[int], None]]:
    """Return a function that limits the free descriptors of this process; the limit is restored afterwards."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def leave_room(count: int) -> None:
        highest = max(int(each.name) for each in Path("/proc/self/fd").iterdir())
        fill = [os.dup(0) for _ in range(highest)]  # the gaps below, and more
        limit = max(fill) + 1
        for descriptor in fill[-count:]:
            os.close(descriptor)
        filled.extend(fill[:-count])
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))

    filled: list[int] = []
    yield leave_room
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
    close_descriptors(filled)


async def test_a_frame_whose_descriptors_were_lost_on_the_way_ends_the_conversation() -> None:
    ours, theirs = socket.socketpair()
    frames: list[bytes] = []
    closed = asyncio.Event()
    channel = Channel(ours, lambda body, _: frames.append(body), closed.set)
    with theirs:
        theirs.sendall(struct.pack("=IH", 2, 1) + b"{}")

        async with asyncio.timeout(5):
            await closed.wait()

    assert frames == []
    assert channel.broken == "a frame came without its descriptors"
    channel.close()


async def test_descriptors_for_which_there_is_no_room_are_lost_and_nothing_else(
    room_for_descriptors: Callable[[int], None],
) -> None:
    ours, theirs = socket.socketpair()
    came: asyncio.Queue[tuple[bytes, list[int]]] = asyncio.Queue()
    reading = Channel(theirs, lambda body, descriptors: came.put_nowait((body, descriptors)), lambda: None)
    writing = Channel(ours, lambda *_: None, lambda: None)
    room_for_descriptors(2)

    for body in (b"full", b"none"):
        writing.send(body, [ours.fileno()] * 3)
    writing.send(b"without")
    async with asyncio.timeout(20):
        told = [await came.get() for _ in range(3)]
    arrived = [descriptor for _, descriptors in told for descriptor in descriptors if descriptor != LOST]
    close_descriptors(arrived)
    writing.send(b"again", [ours.fileno()] * 2)
    async with asyncio.timeout(20):
        body, again = await came.get()

    assert [(body, descriptors.count(LOST)) for body, descriptors in told] == [
        (b"full", 1),
        (b"none", 3),
        (b"without", 0),
    ]
    assert (body, again.count(LOST)) == (b"again", 0)
    close_descriptors(again)
    writing.close()
    reading.close()


async def test_a_frame_of_what_cannot_be_split_may_be_large() -> None:
    ours, theirs = socket.socketpair()
    came: asyncio.Queue[bytes] = asyncio.Queue()
    reading = Channel(theirs, lambda body, _: came.put_nowait(body), lambda: None)
    writing = Channel(ours, lambda *_: None, lambda: None)

    writing.send(bytes(65 << 20))
    writing.send(b"next")

    async with asyncio.timeout(60):
        assert len(await came.get()) == 65 << 20
        assert await came.get() == b"next"
    writing.close()
    reading.close()


async def test_a_frame_larger_than_allowed_ends_the_conversation() -> None:
    ours, theirs = socket.socketpair()
    closed = asyncio.Event()
    channel = Channel(ours, lambda *_: None, closed.set)
    with theirs:
        theirs.sendall(struct.pack("=IH", FRAME_MAX_BYTES + 1, 0))

        async with asyncio.timeout(20):
            await closed.wait()

    assert f"{FRAME_MAX_BYTES + 1} bytes" in channel.broken


async def test_a_descriptor_that_came_is_not_left_to_the_next_program() -> None:
    ours, theirs = socket.socketpair()
    came: asyncio.Queue[list[int]] = asyncio.Queue()
    channel = Channel(ours, lambda _, descriptors: came.put_nowait(descriptors), lambda: None)
    with theirs:
        socket.send_fds(theirs, [struct.pack("=IH", 0, 1)], [theirs.fileno()])

        async with asyncio.timeout(5):
            (descriptor,) = await came.get()

    assert not os.get_inheritable(descriptor)
    os.close(descriptor)
    channel.close()
