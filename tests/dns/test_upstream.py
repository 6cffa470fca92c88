"""Asking other servers, which are real ones at addresses of loopback."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import cast

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest

from userspace_proxy.dns.upstream import Upstream

FIRST, SECOND = "127.53.0.1", "127.53.0.2"
TEXT = dns.message.make_query("www.example.com.", "A").to_wire()[12:]


class Server(asyncio.DatagramProtocol):
    """Answers with one address; notes the port and the id of each query."""

    def __init__(self, answers: Callable[[dns.message.Message], dns.message.Message | None]) -> None:
        self.answers = answers
        self.seen: list[tuple[int, int]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        query = dns.message.from_wire(data)
        if query.question[0].rdtype != dns.rdatatype.HINFO:  # which looks for loops
            self.seen.append((addr[1], query.id))
        if (answer := self.answers(query)) is not None:
            self.transport.sendto(answer.to_wire(), addr)


def with_address(query: dns.message.Message) -> dns.message.Message:
    answer = dns.message.make_response(query)
    answer.answer.append(dns.rrset.from_text(query.question[0].name, 60, "IN", "A", "192.0.2.53"))
    return answer


def failing(query: dns.message.Message) -> dns.message.Message:
    answer = dns.message.make_response(query)
    answer.set_rcode(dns.rcode.SERVFAIL)
    return answer


def silent(_: dns.message.Message) -> None:
    return None


@contextlib.asynccontextmanager
async def serving(
    ip: str, answers: Callable[[dns.message.Message], dns.message.Message | None]
) -> AsyncIterator[Server]:
    transport, server = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: Server(answers), local_addr=(ip, 53)
    )
    try:
        yield server
    finally:
        transport.close()


@contextlib.asynccontextmanager
async def upstream(*servers: str, own: str = "10.96.0.10", resolv_conf: str = "") -> AsyncIterator[Upstream]:
    made = Upstream(servers or None, resolv_conf, [own])
    task = asyncio.create_task(made.run())
    try:
        async with asyncio.timeout(10):
            while not made.probe:
                await asyncio.sleep(0.001)
        yield made
    finally:
        task.cancel()


def addresses(answer: bytes | None) -> list[str]:
    assert answer is not None
    return [str(record) for rrset in dns.message.from_wire(answer).answer for record in rrset]


async def test_an_answer_is_kept_and_its_ttl_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(FIRST, with_address) as server, upstream(FIRST) as asked:
        assert addresses(await asked.ask(TEXT)) == ["192.0.2.53"]
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 20)
        kept = await asked.ask(TEXT)
        monkeypatch.setattr(time, "monotonic", lambda: now + 40)
        again = await asked.ask(TEXT)

    assert kept is not None
    assert 39 <= dns.message.from_wire(kept).answer[0].ttl <= 40
    assert addresses(again) == ["192.0.2.53"]
    assert len(server.seen) == 2


@pytest.mark.parametrize("first", [silent, failing])
async def test_the_second_server_is_asked_if_the_first_does_not_answer(
    first: Callable[[dns.message.Message], dns.message.Message | None],
) -> None:
    async with serving(FIRST, first), serving(SECOND, with_address), upstream(FIRST, SECOND) as asked:
        assert addresses(await asked.ask(TEXT)) == ["192.0.2.53"]


async def test_dead_servers_are_given_up_within_two_seconds() -> None:
    async with serving(FIRST, silent), upstream(FIRST, SECOND) as asked:
        async with asyncio.timeout(2):
            assert await asked.ask(TEXT) is None


async def test_equal_questions_are_asked_once_and_each_query_has_a_port_and_an_id_of_its_own() -> None:
    async with serving(FIRST, with_address) as server, upstream(FIRST) as asked:
        answers = await asyncio.gather(*(asked.ask(TEXT) for _ in range(50)))
        names = [dns.message.make_query(f"{i}.example.com.", "A").to_wire()[12:] for i in range(50)]
        await asyncio.gather(*map(asked.ask, names))

    assert {tuple(addresses(answer)) for answer in answers} == {("192.0.2.53",)}
    assert len(server.seen) == 51
    assert len({port for port, _ in server.seen}) > 40
    assert len({identity for _, identity in server.seen}) > 40


async def test_a_long_answer_is_asked_for_by_tcp() -> None:
    def truncated(query: dns.message.Message) -> dns.message.Message:
        answer = dns.message.make_response(query)
        answer.flags |= dns.flags.TC
        return answer

    async def answer_stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size = int.from_bytes(await reader.readexactly(2), "big")
        wire = with_address(dns.message.from_wire(await reader.readexactly(size))).to_wire()
        writer.write(len(wire).to_bytes(2, "big") + wire)
        writer.close()

    async with (
        serving(FIRST, truncated),
        await asyncio.start_server(answer_stream, FIRST, 53),
        upstream(FIRST) as asked,
    ):
        assert addresses(await asked.ask(TEXT)) == ["192.0.2.53"]


async def test_an_answer_to_another_question_is_ignored() -> None:
    def forged(query: dns.message.Message) -> dns.message.Message:
        other = dns.message.make_query("evil.example.com.", "A")
        other.id = query.id
        return with_address(other)

    async with serving(FIRST, forged), upstream(FIRST) as asked:
        assert await asked.ask(TEXT) is None


async def test_the_file_names_the_servers_and_this_server_is_never_asked(tmp_path: Path) -> None:
    file = tmp_path / "resolv.conf"
    file.write_text(f"search example.com\nnameserver {FIRST}\nnameserver {SECOND}\n")
    async with serving(FIRST, with_address) as own, serving(SECOND, with_address) as other:
        async with upstream(own=FIRST, resolv_conf=str(file)) as asked:
            assert addresses(await asked.ask(TEXT)) == ["192.0.2.53"]
        async with upstream(own=FIRST, resolv_conf="/nowhere") as asked:
            assert await asked.ask(TEXT) is None

    assert (len(own.seen), len(other.seen)) == (0, 1)


async def test_servers_that_ask_this_one_are_not_asked() -> None:
    async with serving(FIRST, with_address) as server, upstream(FIRST) as asked:
        asked.loops = True
        assert await asked.ask(TEXT) is None
        assert server.seen == []


async def test_servers_are_asked_again_once_they_no_longer_ask_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("userspace_proxy.dns.upstream._LOOK_EVERY_S", 0.05)
    async with serving(FIRST, with_address), upstream(FIRST) as asked:
        asked.note_loop()
        assert await asked.ask(TEXT) is None
        async with asyncio.timeout(10):
            while await asked.ask(TEXT) is None:
                await asyncio.sleep(0.01)


def refusing(query: dns.message.Message) -> dns.message.Message:
    answer = dns.message.make_response(query)
    answer.set_rcode(dns.rcode.REFUSED)
    return answer


async def test_a_question_that_failed_is_not_asked_again_for_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(FIRST, failing) as server, upstream(FIRST) as asked:
        first = await asked.ask(TEXT)
        kept = await asked.ask(TEXT)
        asked_before = len(server.seen)
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 1.1)
        server.answers = with_address
        assert addresses(await asked.ask(TEXT)) == ["192.0.2.53"]

    assert asked_before == 2, "the only server is asked twice"
    assert first is not None
    assert kept == first
    assert dns.message.from_wire(kept).rcode() == dns.rcode.SERVFAIL


@pytest.mark.parametrize("is_there", [True, False], ids=["refuses", "is not there"])
async def test_a_server_that_refuses_all_questions_rests_until_it_answers_one(
    monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(serving(FIRST, refusing)) if is_there else None
        asked = await stack.enter_async_context(upstream(FIRST))
        for number in range(100):
            await asked.ask(question(f"{number}.example.com."))
        assert asked.totals["forwarded"] < 20
        assert asked.totals["forward_refused"] > 80
        assert asked.known_answer(TEXT) == b""

        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 1.1)
        if server is None:
            server = await stack.enter_async_context(serving(FIRST, with_address))
        server.answers = with_address
        assert addresses(await asked.ask(TEXT)) == ["192.0.2.53"]
        assert addresses(await asked.ask(question("next.example.com."))) == ["192.0.2.53"]


def question(name: str) -> bytes:
    return dns.message.make_query(name, "A").to_wire()[12:]
