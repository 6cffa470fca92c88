"""Messages from anybody: read, refused or ignored, and never the end of the process."""

from __future__ import annotations

import random
from functools import partial

import dns.message
import dns.rcode
import dns.update
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.dns.questions import DOMAIN, responder
from userspace_proxy.dns.messages import PackedAnswer, joined, read_question, reply, ttl_places
from userspace_proxy.dns.responder import Alias

QUERY = dns.message.make_query(f"web{DOMAIN}", "A", use_edns=0, payload=4096).to_wire()
KNOWN = responder()


def rcode_of(message: bytes) -> int | None:
    """Return the code of the answer to *message*, which another library can read; None without an answer."""
    if (question := read_question(message)) is None:
        return None
    try:
        answer = PackedAnswer(question.error) if question.error else KNOWN.answer(question)
    except Alias:
        return None
    return int(dns.message.from_wire(reply(question, answer or PackedAnswer(5), 65_535)).rcode())


def header(flags: int = 0, *counts: int) -> bytes:
    return b"\0\1" + flags.to_bytes(2, "big") + b"".join(count.to_bytes(2, "big") for count in counts)


NAME = b"\3web\0\0\1\0\1"


@pytest.mark.parametrize(
    ("message", "rcode"),
    [
        (b"", None),
        (b"\0" * 11, None),
        (header(0x8000, 1, 0, 0, 0) + NAME, None),
        (header(0x2800, 1, 0, 0, 0) + NAME, dns.rcode.NOTIMP),
        (header(0, 0, 0, 0, 0), dns.rcode.FORMERR),
        (header(0, 2, 0, 0, 0) + NAME + NAME, dns.rcode.FORMERR),
        (header(0, 1, 0, 0, 0) + NAME[:-1], dns.rcode.FORMERR),
        (header(0, 1, 0, 0, 0) + b"\xc0\x0c\0\1\0\1", dns.rcode.FORMERR),
        (header(0, 1, 0, 0, 0) + b"\x3f" + b"a" * 63 + NAME[-5:-1], dns.rcode.FORMERR),
        (header(0, 1, 0, 0, 0) + (b"\x3f" + b"a" * 63) * 4 + NAME[-5:], dns.rcode.FORMERR),
        (header(0, 1, 0, 0, 0) + NAME[:-1] + b"\3", dns.rcode.REFUSED),
        (QUERY[:-6] + b"\0\1\0\0\0\0", dns.rcode.BADVERS),
        (QUERY[:-3], dns.rcode.FORMERR),
        (QUERY[:11] + b"\2" + QUERY[12:] + QUERY[-11:], dns.rcode.FORMERR),
        (header(0, 1, 0, 0, 0) + b"\3web\0\0\xfc\0\1", dns.rcode.REFUSED),
    ],
    ids=[
        *("empty", "short header", "response", "opcode", "no question", "two questions", "cut short"),
        *("compressed name", "label without an end", "long name", "class", "EDNS version 1", "EDNS cut short"),
        *("EDNS twice", "zone transfer"),
    ],
)
def test_what_is_no_question_is_refused_by_the_right_code(message: bytes, rcode: int | None) -> None:
    assert rcode_of(message) == rcode


def test_an_answer_has_the_opcode_of_its_query() -> None:
    query = dns.update.UpdateMessage("cluster.local")
    question = read_question(query.to_wire())
    assert question is not None

    answer = dns.message.from_wire(reply(question, PackedAnswer(question.error), 512))

    assert query.is_response(answer)
    assert answer.rcode() == dns.rcode.NOTIMP


def test_an_answer_has_edns_if_the_question_had() -> None:
    for query in (dns.message.make_query("web.", "A"), dns.message.make_query("web.", "A", use_edns=0)):
        question = read_question(query.to_wire())
        assert question is not None
        assert dns.message.from_wire(reply(question, PackedAnswer(5), 512)).edns == query.edns


@given(st.binary(max_size=600))
@settings(max_examples=300)
def test_no_bytes_raise_an_error(message: bytes) -> None:
    rcode_of(message)


def test_no_damaged_query_raises_an_error() -> None:
    chance = random.Random(1)
    for _ in range(5_000):
        message = bytearray(QUERY)
        for _ in range(chance.randint(1, 6)):
            message[chance.randrange(2, len(message))] = chance.randrange(256)
        del message[chance.randrange(len(message)) + 1 :]
        question = read_question(bytes(message))
        if question is not None and not question.error:
            try:
                answer = KNOWN.answer(question)
            except Alias:
                continue
            assert reply(question, answer or PackedAnswer(5), 512)


def test_damaged_answers_of_other_servers_are_refused() -> None:
    chance = random.Random(2)
    answer = dns.message.make_response(dns.message.from_wire(QUERY))
    answer.answer.append(dns.rrset.from_text(f"web{DOMAIN}", 60, "IN", "A", "192.0.2.1", "192.0.2.2"))
    whole = answer.to_wire()
    assert [int.from_bytes(whole[at : at + 4], "big") for at in ttl_places(whole)][:2] == [60, 60]
    for _ in range(3_000):
        message = bytearray(whole)
        message[chance.randrange(4, len(message))] = chance.randrange(256)
        for read in (ttl_places, partial(joined, ())):
            try:
                read(bytes(message[: chance.randrange(12, len(message) + 1)]))
            except ValueError:
                continue


def test_an_answer_full_of_pointers_is_given_up() -> None:
    """By a chain of pointers, each record would make the library read all those before it."""
    chain = b"\0" + b"".join((0xC000 | at).to_bytes(2, "big") for at in range(12 + 10, 12 + 10 + 1_600, 2))
    first = b"\1a\0\0\x10\0\1" + bytes(4) + len(chain).to_bytes(2, "big")
    record = (0xC000 | 12 + len(first) + len(chain) - 2).to_bytes(2, "big") + b"\0\1\0\1" + bytes(6)
    message = header(0x8180, 0, 2_001, 0, 0) + first + chain + record * 2_000

    with pytest.raises(ValueError, match="cannot be read"):
        joined((), message)
