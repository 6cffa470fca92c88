"""Splice engines against an oracle: for any actions of both sides in any order, bytes arrive exactly or not at all.

The oracle is what plain TCP promises between two sockets: each side gets a beginning of what the other sent, all of it
unless there was a reset, and after a reset at least what had been acknowledged. The name of a failed test contains its
seed, so it can be repeated.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import socket
from collections.abc import AsyncIterator

import pytest

from tests.contract.splicing import ENGINES, STREAM, Workshop, Writer, difference, workshop
from tests.ends import PATIENCE_S, End, until


@pytest.fixture(params=ENGINES)
async def shop(request: pytest.FixtureRequest) -> AsyncIterator[Workshop]:
    async with workshop(ENGINES[request.param]) as made:
        yield made


# ---- many bytes


async def test_hashes_agree_when_four_connections_are_full_both_ways_and_readers_pause_at_random(
    shop: Workshop,
) -> None:
    size = 20_000_000
    rng = random.Random(4)

    async def write(end: End, first: int) -> str:
        digest = hashlib.blake2b()
        left = size
        while left:
            at = (first + left) % 1_000_000
            piece = STREAM[at : at + min(left, rng.randrange(1, 600_000))]
            digest.update(piece)
            await end.send(piece)
            left -= len(piece)
        end.half_close()
        return digest.hexdigest()

    async def read(end: End) -> str:
        digest = hashlib.blake2b()
        loop = asyncio.get_running_loop()
        buffer = bytearray(1 << 18)
        async with asyncio.timeout(2 * PATIENCE_S):
            while count := await loop.sock_recv_into(end.sock, buffer):
                digest.update(memoryview(buffer)[:count])
                if rng.random() < 0.03:
                    await asyncio.sleep(rng.random() * 0.01)
        return digest.hexdigest()

    connections = [shop.splice() for _ in range(4)]
    ways = [way for c in connections for way in ((c.client, c.backend), (c.backend, c.client))]
    sent, received = await asyncio.gather(
        asyncio.gather(*(write(source, index * 100_003) for index, (source, _) in enumerate(ways))),
        asyncio.gather(*(read(sink) for _, sink in ways)),
    )

    assert received == sent
    assert [await c.ended() for c in connections] == ["closed"] * 4
    assert [c.counters for c in connections] == [(size, size)] * 4


# ---- anything in any order


class Side:
    """One end that acts at random, and checks each byte that it receives."""

    def __init__(self, name: str, end: End) -> None:
        self.name = name
        self.end = end
        self.writer = Writer(end)
        self.peer: Side
        self.received = 0
        self.stalled = False
        self.half_closed = False
        self.has_reset = False
        self.was_told_of_a_reset = False
        self.owed = 0  # what the engine's kernel had acknowledged when this side reset
        self.over = ""  # how reading ended

    def write(self, count: int) -> None:
        if self.half_closed or self.has_reset:
            return
        try:
            self.writer.push(count)
        except (ConnectionResetError, BrokenPipeError):
            self.half_closed = self.was_told_of_a_reset = True

    def half_close(self) -> None:
        if not self.half_closed and not self.has_reset:
            self.half_closed = True
            try:
                self.end.half_close()
            except OSError:
                self.was_told_of_a_reset = True

    def reset(self) -> None:
        if not self.has_reset:
            self.owed = max(0, self.writer.sent - self.end.unacknowledged_bytes)
            self.has_reset = True
            self.end.reset()

    def read(self, count: int) -> bool:
        """Read up to *count* bytes; return whether there may be more."""
        if self.has_reset or self.over:
            return False
        try:
            piece = self.end.sock.recv(count)
        except BlockingIOError:
            return True
        except ConnectionResetError:
            self.over = "reset"
            return False
        wrong = difference(piece, STREAM[self.received : self.received + len(piece)])
        assert not wrong, f"at {self.name}, behind {self.received} good ones: {wrong}"
        self.received += len(piece)
        if not piece:
            # The kernel tells of a reset once only: who was told by writing finds an end of file behind the bytes.
            self.over = "reset" if self.was_told_of_a_reset else "eof"
        return bool(piece)


def roll(rng: random.Random, side: Side, reset_weight: float) -> None:
    """Let *side* do something."""
    doings = ("write", "much", "small", "read", "stall", "half-close", "reset")
    does = rng.choices(doings, (30, 5, 20, 30, 8, 1.5, reset_weight))[0]
    if does == "write":
        side.write(rng.randrange(1, 200_000))
    elif does == "much":
        side.write(rng.randrange(200_000, 1_500_000))
    elif does == "small":
        side.write(rng.randrange(1, 100))
    elif does == "read" and not side.stalled:
        side.read(rng.randrange(1, 200_000))
    elif does == "stall":
        side.stalled = not side.stalled
    elif does == "half-close":
        side.half_close()
    elif does == "reset":
        side.reset()


BUFFERS = (None, 4096, 16_384, 1 << 17)
MORE_SEEDS = [pytest.param(seed, marks=pytest.mark.soak) for seed in range(40, 400)]


@pytest.mark.parametrize("seed", [*range(40), *MORE_SEEDS])
async def test_whatever_both_sides_do_bytes_arrive_in_order_and_none_is_missing(shop: Workshop, seed: int) -> None:
    rng = random.Random(seed)
    spliced = shop.splice(
        buffer_bytes=rng.choice(BUFFERS),
        client_buffer_bytes=rng.choice(BUFFERS),
        family=rng.choice((socket.AF_INET, socket.AF_INET6)),
        start=False,
    )
    client, backend = Side("client", spliced.client), Side("backend", spliced.backend)
    client.peer, backend.peer = backend, client
    reset_weight = rng.choice([0, 0, 0.7])
    # A backend that is dialled for a while: both sides may have done something when the engine takes over.
    starts_at = rng.choice((0, 0, rng.randrange(1, 20)))

    for number in range(rng.randrange(20, 300)):
        if number == starts_at:
            spliced.start()
        roll(rng, rng.choice((client, backend)), reset_weight)
        if rng.random() < 0.5:
            await asyncio.sleep(rng.choice((0, 0, 0, 0, 0, 0.001)))  # the engine has a turn, or all that it wants
    await finish(client, backend)

    how = await spliced.ended()
    resets = [side for side in (client, backend) if side.has_reset]
    if not resets:
        assert (client.received, backend.received) == (backend.writer.sent, client.writer.sent)
        assert spliced.counters == (client.writer.sent, backend.writer.sent)
        assert (client.over, backend.over, how) == ("eof", "eof", "closed")
    for side in resets:
        if side.peer.has_reset:
            continue
        assert side.peer.received >= side.owed, f"{side.name} reset after {side.owed} bytes had been acknowledged"
        assert side.peer.over == "reset" or (side.half_closed and side.peer.over == "eof")
        assert how == f"reset by {side.name}" or (side.half_closed and side.peer.half_closed and how == "closed")


async def finish(*sides: Side) -> None:
    """Let both sides read all, and half-close."""
    for side in sides:
        side.half_close()

    def read_out() -> bool:
        for side in sides:
            for _ in range(20):
                if not side.over and not side.has_reset:
                    side.read(1 << 18)
        return all(side.over or side.has_reset for side in sides)

    await until(read_out, "both sides have read to the end", PATIENCE_S)
