"""The contract of every splice engine, on real TCP connections."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import functools
import gc
import os
import random
import socket
import struct
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.contract.splicing import ENGINES, STREAM, Spliced, Workshop, Writer, difference, workshop
from tests.ends import End, open_descriptors, settled, tcp_pair, until
from userspace_proxy.dataplane.poller import WRITE
from userspace_proxy.model.access_record import UNANSWERED

SIOCATMARK = 0x8905  # asm-generic/sockios.h
SIDES = ("client", "backend")
# How a connection ends that one side resets before it has sent a byte.
RESET_BY = {"client": "reset by client", "backend": UNANSWERED}
# More than one read takes, less than the kernel's buffers on both ways.
SOME = random.Random(1).randbytes(300_000)
MUCH = random.Random(2).randbytes(8_000_000)


@pytest.fixture(params=ENGINES)
async def shop(request: pytest.FixtureRequest) -> AsyncIterator[Workshop]:
    async with workshop(ENGINES[request.param]) as made:
        yield made


# ---- bytes


async def test_bytes_arrive_unchanged_both_ways_at_once(shop: Workshop) -> None:
    spliced = shop.splice()
    up, down = MUCH[:4_000_000], MUCH[4_000_000:]

    _, _, at_backend, at_client = await asyncio.gather(
        spliced.client.send(up),
        spliced.backend.send(down),
        spliced.backend.receive(len(up)),
        spliced.client.receive(len(down)),
    )

    assert (at_backend, at_client) == (up, down)
    assert spliced.counters == (len(up), len(down))


@pytest.mark.parametrize("side", SIDES)
async def test_either_side_may_speak_first(shop: Workshop, side: str) -> None:
    first, second = shop.splice().ends(side)

    await first.send(b"220 ready\r\n")
    assert await second.receive(11) == b"220 ready\r\n"

    await second.send(b"EHLO\r\n")
    assert await first.receive(6) == b"EHLO\r\n"


@pytest.mark.parametrize("side", SIDES)
async def test_what_was_sent_before_the_engine_took_over_arrives(shop: Workshop, side: str) -> None:
    spliced = shop.splice(start=False)
    sender, receiver = spliced.ends(side)
    await sender.send(SOME)
    sender.half_close()

    spliced.start()

    assert await receiver.receive_all() == (SOME, "eof")


async def test_many_small_messages_keep_their_order(shop: Workshop) -> None:
    spliced = shop.splice()
    for number in range(500):
        message = b"%d;" % number
        await spliced.client.send(message)
        assert await spliced.backend.receive(len(message)) == message
        await spliced.backend.send(message)
        assert await spliced.client.receive(len(message)) == message


@pytest.mark.parametrize("side", SIDES)
async def test_an_urgent_byte_arrives_in_its_place_and_nothing_stalls_behind_it(shop: Workshop, side: str) -> None:
    sender, receiver = shop.splice().ends(side)
    await sender.send(b"interrupt")
    sender.sock.send(b"!", socket.MSG_OOB)
    await sender.send(b"and go on")

    assert await asyncio.wait_for(receiver.receive(19), 20) == b"interrupt!and go on"


# Where urgent bytes are among the others: alone, at both ends, in a row, inside of bulk, and around full buffers.
URGENT_AT = {
    "alone": ([], [b"!"]),
    "first": ([b""], [b"!", b"a" * 400_000]),
    "last": ([b"a" * 400_000], [b"!"]),
    "in bulk": ([b"a" * 400_000], [b"!", b"b" * 400_000]),
    "in a row": ([b"a" * 70_000], [b"1", b"2", b"3", b"b" * 70_000, b"4"]),
    "at a full buffer": ([b"a" * (1 << 16)], [b"!", b"b" * ((1 << 16) - 1), b"?", b"c" * (1 << 17), b"."]),
    "many": ([b"a" * 200_000], [b"!" if n % 2 else bytes([n]) * 30_011 for n in range(40)]),
}


def sent_urgently(sender: End, byte: bytes) -> bool:
    try:
        return sender.sock.send(byte, socket.MSG_OOB) == 1
    except BlockingIOError:
        return False


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("closes", [True, False], ids=["then an end", "and no end"])
@pytest.mark.parametrize("where", URGENT_AT)
@pytest.mark.parametrize("begins_late", [True, False], ids=["before the engine", "through the engine"])
async def test_every_byte_of_a_stream_with_urgent_ones_arrives_in_order(
    shop: Workshop, side: str, closes: bool, where: str, begins_late: bool
) -> None:
    """splice(2) stops before an urgent byte, and reports that the stream is drained or has ended."""
    spliced = shop.splice(start=not begins_late, client_buffer_bytes=1 << 20, buffer_bytes=1 << 20)
    sender, receiver = spliced.ends(side)
    before, after = URGENT_AT[where]
    expected = b"".join((*before, *after))

    async def send() -> None:
        for piece in before:
            await sender.send(piece)
        for piece in after:
            if len(piece) == 1:
                await until(functools.partial(sent_urgently, sender, piece), "there is room for it")
            else:
                await sender.send(piece)
        if closes:
            sender.half_close()

    sending = asyncio.ensure_future(send())
    if begins_late:
        await settled(lambda: sender.unacknowledged_bytes, quiet_s=0.01)
        spliced.start()
    received = await receiver.receive(len(expected))
    await sending

    assert difference(received, expected) == ""
    if closes:
        assert await receiver.receive_all() == (b"", "eof")


class InterruptedSocket(socket.socket):
    """A socket whose first read at an urgent byte finds a signal pending. No test can time a real signal so well.

    The answer is the kernel's: EAGAIN, although the byte is there (tcp_recvmsg_locked in net/ipv4/tcp.c).
    The end of a uvloop has the same effect about 20 ms later, when the kernel ends its io_uring (io_ring_exit_work).
    """

    pending_signals = 1

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        is_at_urgent_byte = struct.unpack("i", fcntl.ioctl(self, SIOCATMARK, bytes(4))) != (0,)
        if is_at_urgent_byte and self.pending_signals:
            self.pending_signals -= 1
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return super().recv_into(buffer, nbytes, flags)


@pytest.mark.parametrize("before", [b"", b"a" * 1000, b"a" * 200_000], ids=["first", "behind a message", "in bulk"])
async def test_an_urgent_byte_arrives_although_a_signal_stopped_the_first_read_of_it(
    shop: Workshop, before: bytes
) -> None:
    spliced = shop.splice(start=False, client_buffer_bytes=1 << 20, buffer_bytes=1 << 20)
    spliced.client_socket = interrupted = InterruptedSocket(fileno=spliced.client_socket.detach())
    await spliced.client.send(before)
    await until(functools.partial(sent_urgently, spliced.client, b"!"), "there is room for it")
    await spliced.client.send(b"b" * 100_000)
    await until(lambda: not spliced.client.unacknowledged_bytes, "all has arrived")

    spliced.start()

    expected = before + b"!" + b"b" * 100_000
    assert difference(await spliced.backend.receive(len(expected)), expected) == ""
    assert not interrupted.pending_signals


# ---- slow and stalled readers


@pytest.mark.parametrize("side", SIDES)
async def test_a_slow_reader_gets_everything(shop: Workshop, side: str) -> None:
    sender, receiver = shop.splice(buffer_bytes=4096).ends(side)
    data = MUCH[:600_000]
    sending = asyncio.ensure_future(sender.send(data))
    received = bytearray()
    while len(received) < len(data):
        received += await receiver.receive(min(7_001, len(data) - len(received)))
    await sending

    assert bytes(received) == data


@pytest.mark.parametrize("side", SIDES)
async def test_a_stalled_reader_pushes_back_on_the_writer_and_not_on_the_other_direction(
    shop: Workshop, side: str
) -> None:
    spliced = shop.splice(buffer_bytes=16_384)
    sender, receiver = spliced.ends(side)
    taken = 0

    def push() -> int:
        nonlocal taken
        taken += sender.send_now(MUCH[taken:])
        return taken

    await settled(push)
    assert taken < 1_500_000, "what a stalled reader does not take must stay with the writer"

    await receiver.send(b"the other way is free")
    assert await sender.receive(21) == b"the other way is free"
    assert await receiver.receive(taken) == MUCH[:taken]
    engine: Any = spliced.splice
    assert not any(half.pending for half in (engine.up, engine.down)), "none of them takes memory any more"


# ---- half-close


@pytest.mark.parametrize("side", SIDES)
async def test_a_half_close_passes_and_the_other_direction_continues(shop: Workshop, side: str) -> None:
    spliced = shop.splice()
    first, second = spliced.ends(side)
    await first.send(b"question")
    first.half_close()
    assert await second.receive_all() == (b"question", "eof")
    assert spliced.splice.half_closed

    await second.send(SOME)
    assert await first.receive(len(SOME)) == SOME
    assert not spliced.endings

    second.half_close()
    assert await first.receive_all() == (b"", "eof")
    assert await spliced.ended() == "closed"
    expected = (8, len(SOME))
    assert spliced.counters == (expected if side == "client" else expected[::-1])


@pytest.mark.parametrize("side", SIDES)
async def test_a_half_close_behind_stalled_bytes_comes_after_them(shop: Workshop, side: str) -> None:
    spliced = shop.splice(buffer_bytes=4096)
    sender, receiver = spliced.ends(side)
    taken = 0

    def push() -> int:
        nonlocal taken
        taken += sender.send_now(MUCH[taken : taken + 50_000])
        return taken

    await settled(push)
    sender.half_close()

    assert await receiver.receive_all() == (MUCH[:taken], "eof")
    await receiver.send(b"answer")
    receiver.half_close()
    assert await sender.receive_all() == (b"answer", "eof")
    assert await spliced.ended() == "closed"


async def test_a_connection_without_any_byte_ends_as_closed(shop: Workshop) -> None:
    spliced = shop.splice()
    spliced.client.half_close()
    spliced.backend.half_close()

    assert await spliced.ended() == "closed"
    assert spliced.counters == (0, 0)
    assert await spliced.client.receive_all() == (b"", "eof")


@pytest.mark.parametrize("side", SIDES)
async def test_a_side_that_closes_is_an_end_of_file_for_the_other(shop: Workshop, side: str) -> None:
    spliced = shop.splice()
    first, second = spliced.ends(side)
    await first.send(SOME)
    first.close()

    assert await second.receive_all() == (SOME, "eof")
    second.close()
    assert await spliced.ended() == "closed"


# ---- resets


@pytest.mark.parametrize("side", SIDES)
async def test_a_reset_passes_as_a_reset(shop: Workshop, side: str) -> None:
    spliced = shop.splice()
    first, second = spliced.ends(side)
    first.reset()

    assert await second.receive_all() == (b"", "reset")
    assert await spliced.ended() == RESET_BY[side]


async def test_a_client_whose_backend_resets_before_a_byte_has_passed_is_given_back(shop: Workshop) -> None:
    spliced = shop.splice(start=False)
    unused: list[tuple[int, bytes]] = []
    spliced.start(lambda code, unsent: unused.append((code, unsent)))
    spliced.backend.reset()

    await until(lambda: bool(unused), "the client is given back")
    assert unused == [(errno.ECONNRESET, b"")]
    await until(lambda: spliced.backend_socket.fileno() == -1, "the backend's socket is closed")
    another, backend = tcp_pair()
    shop.poller.watch(another, lambda _: None)
    shop.splicer.start(spliced.client_socket, another, spliced.endings.append, WRITE)
    await spliced.client.send(b"question")
    assert await End(backend).receive(8) == b"question"
    spliced.client.close()
    backend.close()
    assert await spliced.ended() == "closed"


async def test_a_connection_whose_client_is_given_back_leaves_no_reference_cycle(shop: Workshop) -> None:
    spliced = shop.splice(start=False)
    unused: list[int] = []

    def on_unused(code: int, unsent: bytes) -> None:
        unused.append(code)

    held_by_splice = weakref.ref(on_unused)
    spliced.start(on_unused)
    del on_unused
    gc.disable()
    try:
        spliced.backend.reset()
        await until(lambda: bool(unused), "the client is given back")
        spliced.endings.append("given back")
        spliced._splice = None
        await until(lambda: held_by_splice() is None, "it is gone without a collection")
    finally:
        gc.enable()


async def test_bytes_that_a_reset_backend_was_not_sent_are_given_back_and_the_next_backend_gets_them(
    shop: Workshop,
) -> None:
    spliced = shop.splice(start=False)
    unused: list[tuple[int, bytes]] = []
    shop.poller.watch(spliced.backend_socket, lambda _: None)
    await spliced.client.send(b"question")
    await asyncio.sleep(0.01)  # the backend's socket tells that it is writable
    spliced.start(lambda code, unsent: unused.append((code, unsent)), WRITE)
    spliced.backend.reset()  # the client's bytes are read first, and the send fails

    await until(lambda: bool(unused), "the client is given back")
    assert unused == [(errno.ECONNRESET, b"question")]
    another, backend = tcp_pair()
    shop.poller.watch(another, lambda _: None)
    shop.splicer.start(spliced.client_socket, another, spliced.endings.append, WRITE, None, b"question")
    await spliced.client.send(b" and more")
    assert await End(backend).receive(17) == b"question and more"
    spliced.client.close()
    backend.close()
    assert await spliced.ended() == "closed"


async def test_bytes_that_follow_those_for_the_next_backend_do_not_wait_for_their_ack(shop: Workshop) -> None:
    spliced = shop.splice(start=False)
    spliced.backend_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)  # as it is when it is dialled
    shop.poller.watch(spliced.backend_socket, lambda _: None)
    shop.splicer.start(spliced.client_socket, spliced.backend_socket, spliced.endings.append, WRITE, None, b"question")
    assert await spliced.backend.receive(8) == b"question"
    await asyncio.sleep(0.01)  # the client's socket tells that it is writable

    await spliced.client.send(b" and more")

    assert await spliced.backend.receive(9) == b" and more"
    assert spliced.backend_socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    spliced.client.close()
    spliced.backend.close()
    assert await spliced.ended() == "closed"


@pytest.mark.parametrize(
    "before", ["a byte to the backend", "a byte to the client", "the client's end", "the backend's end"]
)
async def test_no_client_is_given_back_once_something_has_passed(shop: Workshop, before: str) -> None:
    spliced = shop.splice(start=False)
    spliced.start(lambda code, unsent: pytest.fail("given back"))
    if before == "a byte to the backend":
        await spliced.client.send(b"x")
        assert await spliced.backend.receive(1) == b"x"
    elif before == "a byte to the client":
        await spliced.backend.send(b"x")
        assert await spliced.client.receive(1) == b"x"
    elif before == "the backend's end":
        spliced.backend.half_close()
        assert await spliced.client.receive_all() == (b"", "eof")
    else:
        spliced.client.half_close()
        assert await spliced.backend.receive_all() == (b"", "eof")
    spliced.backend.reset()

    if before != "the backend's end":
        assert await spliced.client.receive_all() == (b"", "reset")
    is_unanswered = before in ("a byte to the backend", "the backend's end")
    assert await spliced.ended() == (UNANSWERED if is_unanswered else "reset by backend")


@pytest.mark.parametrize("side", SIDES)
async def test_bytes_before_a_reset_are_delivered_before_it(shop: Workshop, side: str) -> None:
    spliced = shop.splice()
    first, second = spliced.ends(side)
    await first.send(SOME)
    await until(lambda: not first.unacknowledged_bytes, "all is on its way")
    first.reset()

    assert await second.receive_all() == (SOME, "reset")
    assert await spliced.ended() == f"reset by {side}"


async def test_a_reader_that_is_slow_gets_the_bytes_before_a_reset_too(shop: Workshop) -> None:
    spliced = shop.splice(buffer_bytes=16_384)
    first, second = spliced.backend, spliced.client
    taken = 0

    def push() -> int:
        nonlocal taken
        taken += first.send_now(MUCH[taken : taken + 10_000])
        return taken

    await settled(push)
    unacknowledged = first.unacknowledged_bytes
    first.reset()
    received = bytearray()
    for _ in range(12):
        await asyncio.sleep(0.1)  # the reader is alive, it only reads slowly
        received += await second.receive(500)
    rest, how = await second.receive_all()
    received += rest

    assert how == "reset"
    assert len(received) >= taken - unacknowledged
    assert MUCH.startswith(received)


@pytest.mark.parametrize("side", SIDES)
async def test_a_reset_after_a_half_close_passes_as_a_reset(shop: Workshop, side: str) -> None:
    spliced = shop.splice()
    first, second = spliced.ends(side)
    await first.send(b"question")
    first.half_close()
    assert await second.receive(9) == b"question"
    first.reset()

    def is_broken() -> bool:
        try:
            second.send_now(b"answer")
        except (ConnectionResetError, BrokenPipeError):
            return True
        return False

    await until(is_broken, "the reset arrives")
    assert await spliced.ended() == f"reset by {side}"


@pytest.mark.parametrize("side", SIDES)
async def test_a_reset_after_a_half_close_is_noticed_although_the_other_side_is_silent(
    shop: Workshop, side: str
) -> None:
    spliced = shop.splice()
    first, second = spliced.ends(side)
    await first.send(b"question")
    first.half_close()
    assert await second.receive_all() == (b"question", "eof")
    await until(lambda: spliced.splice.half_closed, "the engine knows the end, too")

    first.reset()

    assert await spliced.ended() == f"reset by {side}"


async def test_a_reply_before_a_reset_arrives_although_the_client_ends_its_stream_meanwhile(shop: Workshop) -> None:
    spliced = shop.splice(buffer_bytes=65_536)
    writer = Writer(spliced.backend)
    await settled(lambda: writer.push(50_000))
    arrived = writer.sent - spliced.backend.unacknowledged_bytes
    spliced.backend.reset()
    await spliced.client.send(b"too late")
    engine: Any = spliced.splice
    await until(lambda: bool(engine.broken), "the engine cannot send it")
    spliced.client.half_close()

    received, how = await spliced.client.receive_all()

    assert how == "reset"
    assert len(received) >= arrived
    assert not difference(received, STREAM[: len(received)])


@pytest.mark.parametrize("side", SIDES)
async def test_a_reset_of_a_stalled_reader_reaches_the_writer(shop: Workshop, side: str) -> None:
    spliced = shop.splice(buffer_bytes=4096)
    reader, writer = spliced.ends(side)
    await settled(lambda: writer.send_now(MUCH[:50_000]))
    reader.reset()

    assert await writer.receive_all() == (b"", "reset")
    assert await spliced.ended() == RESET_BY[side]


@pytest.mark.parametrize("side", SIDES)
async def test_bytes_sent_before_a_reset_arrive_although_sending_to_that_side_failed(shop: Workshop, side: str) -> None:
    spliced = shop.splice(start=False)
    first, second = spliced.ends(side)
    await first.send(b"503 go away")
    await second.send(b"a request that nobody will read")
    first.reset()

    spliced.start()

    assert await second.receive_all() == (b"503 go away", "reset")
    assert await spliced.ended() == f"reset by {side}"


async def test_a_reader_that_resets_while_a_reset_waits_for_it_ends_the_wait(shop: Workshop) -> None:
    spliced = shop.splice(buffer_bytes=4096)
    await settled(lambda: spliced.client.send_now(MUCH[:50_000]))
    spliced.client.reset()
    await asyncio.sleep(0)
    spliced.backend.reset()

    assert (await asyncio.wait_for(spliced.ended(), 1.5)).startswith("reset by")


async def test_a_reset_waits_for_a_reader_for_as_long_as_half_closed_connections_may_last(shop: Workshop) -> None:
    spliced = shop.splice(buffer_bytes=65_536)
    engines_end = End(spliced.backend_socket)
    taken = 0
    while not engines_end.unacknowledged_bytes:
        await spliced.client.send(MUCH[taken : taken + 1000])
        taken += 1000
        await until(lambda: spliced.splice.bytes_to_backend == taken, "the engine has passed it on")  # noqa: B023
        await settled(lambda: engines_end.unacknowledged_bytes, quiet_s=0.004)

    spliced.client.reset()

    await until(lambda: spliced.splice.half_closed, "the engine has seen the reset")
    assert not spliced.endings
    assert await spliced.backend.receive_all() == (MUCH[:taken], "reset")
    assert await spliced.ended() == "reset by client"


# ---- endings


async def test_a_cut_resets_both_sides_and_has_ended_when_it_returns(shop: Workshop) -> None:
    spliced = shop.splice()
    await spliced.client.send(b"hello")
    assert await spliced.backend.receive(5) == b"hello"

    spliced.splice.cut("idle")

    assert spliced.endings == ["idle"]
    assert await spliced.client.receive_all() == (b"", "reset")
    assert await spliced.backend.receive_all() == (b"", "reset")


async def test_a_second_cut_does_nothing(shop: Workshop) -> None:
    spliced = shop.splice()
    spliced.splice.cut("first")
    spliced.splice.cut("second")

    assert await spliced.ended() == "first"


async def test_on_end_is_never_called_before_start_returns(shop: Workshop) -> None:
    spliced = shop.splice(start=False)
    spliced.client.reset()
    spliced.backend.reset()

    spliced.start()

    assert spliced.endings == []
    assert (await spliced.ended()).startswith("reset by")


async def test_no_descriptor_is_left_however_connections_end(shop: Workshop) -> None:
    before = open_descriptors()

    async def live_and_end(how: str) -> None:
        spliced = Spliced(shop.poller, shop.splicer, None, None)
        spliced.start()
        await spliced.client.send(b"x")
        await spliced.backend.receive(1)
        if how == "cut":
            spliced.splice.cut("cut")
        for end in (spliced.client, spliced.backend):
            if how == "reset":
                end.reset()
            else:
                end.close()
        await spliced.ended()

    for _ in range(30):
        await asyncio.gather(*(live_and_end(how) for how in ("closed", "cut", "reset")))

    assert open_descriptors() == before


class FaultySocket(socket.socket):
    """A socket that an engine cannot cope with."""

    def recv_into(self, *_: object) -> int:
        raise MemoryError


async def test_an_engine_that_fails_at_one_connection_ends_that_one(
    shop: Workshop, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = shop.splice(), shop.splice(start=False)
    bad.client_socket = FaultySocket(fileno=bad.client_socket.detach())
    bad.start()

    await bad.client.send(b"x")

    assert await bad.backend.receive_all() == (b"", "reset")
    assert await bad.ended() == "a bug"
    assert "a bug" in caplog.text
    await good.client.send(b"x")
    assert await good.backend.receive(1) == b"x"
