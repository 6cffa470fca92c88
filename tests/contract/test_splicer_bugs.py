"""Five bugs that lose, double or mix bytes while every benchmark looks perfect; tests for each, on every engine.

The tests look at both ends, because engines differ in where they would have the bug. A sink with small buffers is
stalled before a read has filled whatever an engine reads into; one with roomy buffers takes some full reads first, and
with them what an engine does for bulk.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator

import pytest

from tests.contract.splicing import ENGINES, STREAM, Workshop, Writer, difference, workshop
from tests.ends import PATIENCE_S, settled, until

SMALL, ROOMY = 4096, 1 << 17
AMPLE = 1 << 20


@pytest.fixture(params=ENGINES)
async def shop(request: pytest.FixtureRequest) -> AsyncIterator[Workshop]:
    async with workshop(ENGINES[request.param]) as made:
        yield made


# ---- nothing could be sent right after a good read, and what was read is forgotten


@pytest.mark.parametrize(("piece_bytes", "buffer_bytes"), [(97, SMALL), (300_000, ROOMY)])
async def test_bytes_survive_a_sink_that_is_full_right_after_they_were_read(
    shop: Workshop, piece_bytes: int, buffer_bytes: int
) -> None:
    """The pieces fill the sink, so that the last one is read and no byte of it can be sent."""
    spliced = shop.splice(buffer_bytes=buffer_bytes)
    writer = Writer(spliced.client)
    rounds_in_vain = 0
    while rounds_in_vain < 50:
        before = writer.sent
        rounds_in_vain = 0 if writer.push(piece_bytes) > before else rounds_in_vain + 1
        await asyncio.sleep(0)
    spliced.client.half_close()
    received, how = await spliced.backend.receive_all()

    assert writer.sent < len(STREAM), "the sink has never been full"
    assert (difference(received, STREAM[: writer.sent]), how) == ("", "eof")


# ---- a part was sent, and all of it is sent again


@pytest.mark.parametrize("buffer_bytes", [SMALL, ROOMY])
async def test_a_send_that_took_a_part_goes_on_where_it_stopped(shop: Workshop, buffer_bytes: int) -> None:
    spliced = shop.splice(buffer_bytes=buffer_bytes, client_buffer_bytes=AMPLE)
    size = 200_000 if buffer_bytes == SMALL else 3_000_000
    sending = asyncio.ensure_future(spliced.client.send(STREAM[:size]))
    received = bytearray()
    while len(received) < size:
        received += await spliced.backend.receive(min(buffer_bytes + 903, size - len(received)))
        assert not difference(received, STREAM[: len(received)])
    await sending


# ---- bytes of one way are read into the buffer from which those of the other are yet to be sent


@pytest.mark.parametrize("first", ["client", "backend"])
async def test_bytes_of_one_direction_never_appear_in_the_other(shop: Workshop, first: str) -> None:
    """Both directions are stalled with unsent bytes, and both continue before the engine gets an event."""
    spliced = shop.splice(buffer_bytes=SMALL)
    up, down = STREAM[:300_000], STREAM[300_000:600_000]
    sendings = [asyncio.ensure_future(spliced.client.send(up)), asyncio.ensure_future(spliced.backend.send(down))]
    received = {end: bytearray() for end in spliced.ends(first)}
    async with asyncio.timeout(PATIENCE_S):
        while not all(len(got) == len(up) for got in received.values()):
            await settled(lambda: sum(spliced.counters), quiet_s=0.002)
            for end, got in received.items():
                got += end.receive_now()
            assert not difference(received[spliced.backend], up[: len(received[spliced.backend])])
            assert not difference(received[spliced.client], down[: len(received[spliced.client])])
    await asyncio.gather(*sendings)


# ---- a full read into memory of a way that moves in bulk by now is dropped


async def test_full_reads_of_a_direction_that_was_bulk_before_arrive(shop: Workshop) -> None:
    """A direction repeatedly carries more than one read takes, then is drained, then carries a little."""
    spliced = shop.splice(buffer_bytes=AMPLE)
    writer = Writer(spliced.client)
    received = bytearray()
    for piece_bytes in (400_000, 100, 300_000, 65_536, 65_537, 400_000):
        writer.push(piece_bytes)
        received += await spliced.backend.receive(writer.sent - len(received))
        assert not difference(received, STREAM[: writer.sent])
        await settled(lambda: sum(spliced.counters), quiet_s=0.002)
    spliced.client.half_close()

    assert await spliced.backend.receive_all() == (b"", "eof")


async def test_full_reads_arrive_when_more_ways_are_in_bulk_than_there_is_room_for(shop: Workshop) -> None:
    """So many directions are stalled with unsent bytes that an engine must serve the others without a pipe."""
    crowd = [shop.splice(buffer_bytes=ROOMY, client_buffer_bytes=AMPLE) for _ in range(60)]
    writers = [Writer(spliced.client) for spliced in crowd]
    await settled(lambda: sum(writer.push(1_500_000 - writer.sent) for writer in writers))
    received = await asyncio.gather(
        *(spliced.backend.receive(writer.sent) for spliced, writer in zip(crowd, writers, strict=True))
    )

    for got, writer in zip(received, writers, strict=True):
        assert not difference(got, STREAM[: writer.sent])
    await until(lambda: not shop.poller._bulk, "nothing has turns in bulk any more")


async def test_sockets_that_block_do_not_stop_the_engine(shop: Workshop) -> None:
    """Accepted sockets block: making each non-blocking would cost a system call."""
    spliced = shop.splice(start=False, buffer_bytes=ROOMY, client_buffer_bytes=AMPLE)
    for sock in (spliced.client_socket, spliced.backend_socket):
        sock.setblocking(True)
    spliced.start()
    writer = Writer(spliced.client)
    received = bytearray()
    while writer.sent < 2_000_000:
        await settled(functools.partial(writer.push, 1_000_000), quiet_s=0.01)
        received += await spliced.backend.receive(writer.sent - len(received))

    assert not difference(received, STREAM[: writer.sent])


# ---- a way that is to go on next turn goes on though what it has in hand could not be sent yet


@pytest.mark.parametrize("buffer_bytes", [SMALL, 4 * SMALL, ROOMY])
async def test_a_queued_direction_stops_when_its_sink_is_full(shop: Workshop, buffer_bytes: int) -> None:
    """Full reads queue the direction for the next turn. Then the sink fills, and the unsent bytes must go first."""
    spliced = shop.splice(buffer_bytes=buffer_bytes, client_buffer_bytes=4 * AMPLE)
    writer = Writer(spliced.client)
    received = bytearray()
    while writer.sent < 3_000_000:
        writer.push(700_000)
        received += await spliced.backend.receive(min(90_001, writer.sent - len(received)))
        assert not difference(received, STREAM[: len(received)])
    spliced.client.half_close()
    rest, how = await spliced.backend.receive_all()

    assert (difference(received + rest, STREAM[: writer.sent]), how) == ("", "eof")
