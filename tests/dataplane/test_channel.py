"""Frames with descriptors over a unix socket."""

from __future__ import annotations

import asyncio
import os
import socket
import struct

from userspace_proxy.dataplane.channel import Channel


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
    channel.close()


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
