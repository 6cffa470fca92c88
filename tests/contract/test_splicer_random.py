"""Splice engines against an oracle: whatever both sides do, in whatever order, bytes arrive exactly or not at all.

The first tests bear the names of bugs that lose bytes while every benchmark looks perfect.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator

import pytest

from tests.contract.splicing import ENGINES, Workshop, workshop
from tests.ends import PATIENCE_S, End, settled, until

STREAM = random.Random(3).randbytes(4_000_000)


@pytest.fixture(params=ENGINES)
async def shop(request: pytest.FixtureRequest) -> AsyncIterator[Workshop]:
    async with workshop(ENGINES[request.param]) as made:
        yield made


class Writer:
    """Sends the stream from its beginning."""

    def __init__(self, end: End) -> None:
        self._end = end
        self.sent = 0

    def push(self, count: int) -> int:
        """Send up to *count* more bytes, as much as the kernel takes; return how much was sent since the beginning."""
        self.sent += self._end.send_now(STREAM[self.sent : self.sent + count])
        return self.sent


# ---- bugs that have a name


async def test_bytes_survive_a_sink_that_is_full_right_after_they_were_read(shop: Workshop) -> None:
    """Small messages fill the sink to the brim, so that one of them is read and nothing of it can be sent."""
    spliced = shop.splice(buffer_bytes=4096)
    writer = Writer(spliced.client)
    rounds_in_vain = 0
    while rounds_in_vain < 50:
        before = writer.sent
        rounds_in_vain = 0 if writer.push(97) > before else rounds_in_vain + 1
        await asyncio.sleep(0)
    spliced.client.half_close()

    assert await spliced.backend.receive_all() == (STREAM[: writer.sent], "eof")


async def test_a_send_that_took_a_part_goes_on_where_it_stopped(shop: Workshop) -> None:
    spliced = shop.splice(buffer_bytes=4096, client_buffer_bytes=1 << 20)
    sending = asyncio.ensure_future(spliced.client.send(STREAM[:500_000]))
    received = b"".join([await spliced.backend.receive(4_999) for _ in range(100)])
    rest = await spliced.backend.receive(500_000 - len(received))
    await sending

    assert received + rest == STREAM[:500_000]


async def test_bytes_of_one_way_never_turn_up_in_the_other(shop: Workshop) -> None:
    """Both ways are stalled with bytes in hand, and are flushed in the same turn."""
    spliced = shop.splice(buffer_bytes=4096)
    up, down = STREAM[:1_000_000], STREAM[1_000_000:2_000_000]
    sendings = [asyncio.ensure_future(spliced.client.send(up)), asyncio.ensure_future(spliced.backend.send(down))]
    await settled(lambda: sum(spliced.counters))

    at_backend, at_client = await asyncio.gather(spliced.backend.receive(len(up)), spliced.client.receive(len(down)))
    await asyncio.gather(*sendings)

    assert at_backend == up
    assert at_client == down


async def test_a_way_that_is_to_go_on_next_turn_stops_when_its_sink_is_full(shop: Workshop) -> None:
    """Full reads queue the way for the next turn; then the sink fills, and what is in hand must go first."""
    spliced = shop.splice(buffer_bytes=16_384, client_buffer_bytes=4 << 20)
    writer = Writer(spliced.client)
    reader = End(spliced.backend.sock)
    received = bytearray()
    while writer.sent < 3_000_000:
        writer.push(700_000)
        received += await reader.receive(min(90_001, writer.sent - len(received)))
    spliced.client.half_close()
    rest, how = await reader.receive_all()

    assert how == "eof"
    assert received + rest == STREAM[: writer.sent]


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
    """One end that does what the dice say, and checks each byte that it gets."""

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
        assert piece == STREAM[self.received : self.received + len(piece)], f"at {self.name} from {self.received} on"
        self.received += len(piece)
        if not piece:
            # The kernel tells of a reset once only: who was told by writing finds an end of file behind the bytes.
            self.over = "reset" if self.was_told_of_a_reset else "eof"
        return bool(piece)


def roll(rng: random.Random, side: Side, reset_weight: float) -> None:
    """Let *side* do something."""
    does = rng.choices(("write", "small", "read", "stall", "half-close", "reset"), (30, 20, 30, 8, 1.5, reset_weight))[
        0
    ]
    if does == "write":
        side.write(rng.randrange(1, 200_000))
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


@pytest.mark.parametrize("seed", range(40))
async def test_whatever_both_sides_do_bytes_arrive_in_order_and_none_is_missing(shop: Workshop, seed: int) -> None:
    rng = random.Random(seed)
    spliced = shop.splice(buffer_bytes=rng.choice([None, 4096, 16_384]))
    client, backend = Side("client", spliced.client), Side("backend", spliced.backend)
    client.peer, backend.peer = backend, client
    reset_weight = rng.choice([0, 0, 0.7])

    for _ in range(rng.randrange(20, 300)):
        roll(rng, rng.choice((client, backend)), reset_weight)
        if rng.random() < 0.5:
            await asyncio.sleep(0)
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
    """Nobody stalls, everybody half-closes, and all is read."""
    for side in sides:
        side.half_close()

    def read_out() -> bool:
        for side in sides:
            for _ in range(20):
                if not side.over and not side.has_reset:
                    side.read(1 << 18)
        return all(side.over or side.has_reset for side in sides)

    await until(read_out, "both sides have read to the end", PATIENCE_S)
