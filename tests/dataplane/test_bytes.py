"""Hundreds of megabytes through a worker process, both ways at once, hashed where they are sent and where they arrive.

Ends are threads with blocking sockets, so that sending, receiving and hashing go on side by side and no event loop of
the test is in it. A stream is made while it is sent, and nobody holds more of it than a block.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.dataplane.world import LISTENER, NAME, PORTAL, PORTAL6, TCP_PORT, service_port
from userspace_proxy.dataplane.connections import Limits
from userspace_proxy.dataplane.remote import RemotePlane
from userspace_proxy.dataplane.wire import WorkerSettings
from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.listeners import Backends, ListenerSpec

CONNECTIONS = 8
STREAM_BYTES = 100_000_000
BLOCK_BYTES = 1 << 20
PATIENCE_S = 20.0


def pieces(seed: int) -> Iterator[memoryview]:
    """Return a stream of STREAM_BYTES in pieces of all sizes; a piece is good until the next one is asked for.

    It is one random block again and again, each time with its number at the start: what is lost, doubled or
    misplaced shows in the hash.
    """
    rng = random.Random(seed)
    block = bytearray(rng.randbytes(BLOCK_BYTES))
    view = memoryview(block)
    for number in range(-(-STREAM_BYTES // BLOCK_BYTES)):
        struct.pack_into("!Q", block, 0, number)
        at, end = 0, min(BLOCK_BYTES, STREAM_BYTES - number * BLOCK_BYTES)
        while at < end:
            count = min(end - at, rng.choice((rng.randrange(1, 2_000), rng.randrange(1, 1 << 19), BLOCK_BYTES)))
            yield view[at : at + count]
            at += count


def send(sock: socket.socket, seed: int) -> str:
    """Send a whole stream and half-close; return its hash."""
    digest = hashlib.blake2b()
    for piece in pieces(seed):
        digest.update(piece)
        sock.sendall(piece)
    sock.shutdown(socket.SHUT_WR)
    return digest.hexdigest()


def receive(sock: socket.socket, seed: int) -> str:
    """Read to the end, with pauses of every length; return the hash of the received bytes."""
    digest = hashlib.blake2b()
    rng = random.Random(seed)
    buffer = memoryview(bytearray(1 << 18))
    while count := sock.recv_into(buffer, rng.choice((rng.randrange(1, 5_000), 1 << 16, 1 << 18, 1 << 18))):
        digest.update(buffer[:count])
        if rng.random() < 0.02:
            time.sleep(rng.choice((0.001, 0.01, 0.1)))
    return digest.hexdigest()


def connect(listeners: Sequence[socket.socket], number: int) -> tuple[socket.socket, socket.socket]:
    """Return the client and the backend of the connection *number*; families take turns.

    A client meets endpoints of its own family, so it is known at which of *listeners* each one arrives.
    """
    client = socket.create_connection((PORTAL, PORTAL6)[number % 2], timeout=PATIENCE_S)
    backend, _ = listeners[number % 2].accept()
    backend.settimeout(PATIENCE_S)
    return client, backend


def exchange(listeners: Sequence[socket.socket]) -> tuple[list[str], list[str]]:
    """Send a stream in both directions of each connection; return the hashes of the sent and of the received bytes."""
    with contextlib.ExitStack() as stack:
        pairs = [connect(listeners, number) for number in range(CONNECTIONS)]
        for pair in pairs:
            for sock in pair:
                stack.enter_context(sock)
        ways = [way for client, backend in pairs for way in ((client, backend), (backend, client))]
        pool = stack.enter_context(ThreadPoolExecutor(2 * len(ways)))
        sending = [pool.submit(send, source, seed) for seed, (source, _) in enumerate(ways)]
        receiving = [pool.submit(receive, sink, seed) for seed, (_, sink) in enumerate(ways)]
        return [done.result() for done in sending], [done.result() for done in receiving]


@pytest.mark.asyncio(loop_factories=["asyncio"])
@pytest.mark.parametrize(
    ("splice", "loop"),
    [
        ("auto", "uvloop"),
        ("copy", "asyncio"),
        pytest.param("auto", "asyncio", marks=pytest.mark.soak),
        pytest.param("copy", "uvloop", marks=pytest.mark.soak),
    ],
)
async def test_hashes_agree_when_eight_connections_are_full_both_ways_and_readers_pause_at_random(
    splice: str, loop: str, capfd: pytest.CaptureFixture[str]
) -> None:
    plane = RemotePlane(WorkerSettings(Limits(), splice=splice, loop=loop))
    plane.start()
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as listener,
            socket.create_server(("::1", 0), family=socket.AF_INET6) as listener6,
        ):
            listeners = (listener, listener6)
            for one in listeners:
                one.settimeout(PATIENCE_S)
            endpoints = tuple(Endpoint(*one.getsockname()[:2]) for one in listeners)
            assert await plane.open([ListenerSpec(service_port(), TCP_PORT)]) == {}
            await plane.update({LISTENER: Backends(endpoints, endpoints)})

            sent, received = await asyncio.to_thread(exchange, listeners)

        assert received == sent
        while (stats := await plane.stats()).connections_open:
            await asyncio.sleep(0.01)
        counters = stats.services[NAME]
        assert (counters.accepted, counters.failed) == (CONNECTIONS, 0)
        assert (counters.bytes_to_backends, counters.bytes_to_clients) == (CONNECTIONS * STREAM_BYTES,) * 2
        assert stats.worker_restarts == 0
        assert not capfd.readouterr().err, "the worker complains"
    finally:
        await plane.close(0)
