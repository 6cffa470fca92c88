"""DNS messages as bytes: questions are read here, records are packed and read by the library dnslib.

No other module knows the library. Why it, and what it is not used for: docs/decisions/dns-messages.md.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import dnslib

A, NS, CNAME, SOA, PTR, TXT, AAAA, SRV, ANY = 1, 2, 5, 6, 12, 16, 28, 33, 255
INTERNET = 1
# Of every record of the cluster domain. Resolvers keep negative answers as long.
TTL_S = 5
NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED, BADVERS = 0, 1, 2, 3, 4, 5, 16
# Bits of the header's flags.
QR, AUTHORITATIVE, TRUNCATED, RECURSION_DESIRED, RECURSION_AVAILABLE = 0x8000, 0x400, 0x200, 0x100, 0x80
_OPCODE = 0x7800

HEADER = struct.Struct("!6H")
MESSAGE_MAX_BYTES = 65_535
PLAIN_BYTES = 512
# Fits into a packet on every path (RFC 9715).
EDNS_BYTES = 1_232
_NAME_MAX_BYTES, _LABEL_MAX_BYTES = 255, 63
# Room for records behind the longest question, with EDNS.
BODY_MAX_BYTES = MESSAGE_MAX_BYTES - HEADER.size - _NAME_MAX_BYTES - 4 - 11
RCODE_MASK = 0xF
_ECHOED = RECURSION_DESIRED | 0x10  # CD, of RFC 4035
# The record OPT of RFC 6891: the root, its type; size, high bits of the code, version, flags and length.
_OPT, _OPT_REST, _OPT_BYTES = b"\0\0\x29", struct.Struct("!HBBHH"), 11
_ANSWER_OPT = _OPT + _OPT_REST.pack(EDNS_BYTES, 0, 0, 0, 0)
# A pointer to the name in the question.
_SAME_NAME = b"\xc0\x0c"
_INTERNET = b"\0\1"

Srv = tuple[int, int, int, str]
Soa = tuple[str, str, tuple[int, ...]]
Value = str | Srv | Soa
Values = Mapping[int, Sequence[Value]]
"""Type -> values of the records of one name. SRV: priority, weight, port and target; SOA: two names and five times."""


class Record(NamedTuple):
    """``owner``: a name without its final dot, or "" for that of the question."""

    owner: str
    type: int
    value: Value


def type_name(kind: int) -> str:
    """Return the name of a type, or "other": a client may ask for 65,536 of them."""
    return str(dnslib.QTYPE.forward.get(kind, "other"))


def rcode_name(rcode: int) -> str:
    return str(dnslib.RCODE.forward.get(rcode, rcode))


class Question(NamedTuple):
    """A query. ``text``: the question as it was sent. ``edns_bytes``: the size of an answer that the client takes.

    ``edns_bytes`` is None without EDNS. ``error``: the code to refuse it by.
    """

    id: int
    flags: int
    text: bytes = b""
    edns_bytes: int | None = None
    error: int = NOERROR

    @property
    def type(self) -> int:
        return int.from_bytes(self.text[-4:-2], "big")

    @property
    def key(self) -> bytes:
        """What equal questions share, however their letters are written."""
        return self.text[:-4].lower() + self.text[-4:]

    def labels(self) -> tuple[str, ...]:
        """Return the labels of the name, in lower case."""
        text, at, found = self.text, 0, []
        while length := text[at]:
            found.append(text[at + 1 : at + 1 + length].lower().decode("latin-1"))
            at += 1 + length
        return tuple(found)


def read_question(message: bytes) -> Question | None:
    """Return the question of *message*; None if no answer is due: to an answer, or to what is no message at all."""
    if len(message) < HEADER.size:
        return None
    identity, flags, questions, answers, authorities, additionals = HEADER.unpack_from(message)
    if flags & QR:
        return None
    if flags & _OPCODE:
        return Question(identity, flags, error=NOTIMP)
    at, size = HEADER.size, len(message)
    while at < size and 0 < message[at] <= _LABEL_MAX_BYTES:
        at += 1 + message[at]
    end = at + 5
    # A name with a pointer, one that is too long, and one that the message cuts off are refused alike.
    if questions != 1 or answers or authorities or end > size or message[at] or at - HEADER.size >= _NAME_MAX_BYTES:
        return Question(identity, flags, error=FORMERR)
    text, edns_bytes, error = message[HEADER.size : end], None, NOERROR
    if additionals and message[end : end + 3] == _OPT:
        if size < end + _OPT_BYTES:
            return Question(identity, flags, error=FORMERR)
        edns_bytes, _, version, _, length = _OPT_REST.unpack_from(message, end + 3)
        if size < end + _OPT_BYTES + length:
            return Question(identity, flags, error=FORMERR)
        error = BADVERS if version else NOERROR
    if text[-2:] != _INTERNET:
        error = REFUSED
    return Question(identity, flags, text, edns_bytes, error)


# ---- answers


class Answer(NamedTuple):
    """A packed answer without its question, which each client writes in its own way.

    ``counts``: of the records in ``body``, by section. ``surplus``: packed records of the answer section, if they do
    not fit into one message; then the body is empty.
    """

    rcode: int
    flags: int = 0
    counts: tuple[int, int, int] = (0, 0, 0)
    body: bytes = b""
    surplus: tuple[bytes, ...] = ()


def pack_answer(
    rcode: int,
    flags: int = 0,
    answers: Sequence[Record] = (),
    authorities: Sequence[Record] = (),
    additionals: Sequence[Record] = (),
    packed_answers: Sequence[bytes] = (),
) -> Answer:
    """Return an answer with these records. *additionals* are left out if they do not fit."""
    packed = [*map(pack_record, answers), *packed_answers, *map(pack_record, authorities)]
    body = b"".join(packed)
    if len(body) > BODY_MAX_BYTES:
        return Answer(rcode, flags, surplus=tuple(packed))
    more = b"".join(map(pack_record, additionals))
    if len(body) + len(more) > BODY_MAX_BYTES:
        more, additionals = b"", ()
    return Answer(rcode, flags, (len(answers) + len(packed_answers), len(authorities), len(additionals)), body + more)


def fitting(answer: Answer, first: int) -> Answer:
    """Return *answer* with as many of its surplus records as fit, from the one with index *first* on."""
    room, taken = BODY_MAX_BYTES, []
    for record in itertools.chain(answer.surplus[first:], answer.surplus[:first]):
        if (room := room - len(record)) < 0:
            break
        taken.append(record)
    return answer._replace(counts=(len(taken), 0, 0), body=b"".join(taken), surplus=())


def reply(question: Question, answer: Answer, limit_bytes: int) -> bytes:
    """Return *answer* as a message for *question*; without records, and marked, if it is longer than *limit_bytes*."""
    rcode, flags, (answers, authorities, additionals), body, surplus = answer
    edns = b""
    if question.edns_bytes is not None:
        edns = _ANSWER_OPT if rcode <= RCODE_MASK else _ANSWER_OPT[:5] + bytes([rcode >> 4]) + _ANSWER_OPT[6:]
    if surplus or HEADER.size + len(question.text) + len(body) + len(edns) > limit_bytes:
        flags, body, answers, authorities, additionals = flags | TRUNCATED, b"", 0, 0, 0
    flags |= QR | question.flags & _ECHOED | rcode & RCODE_MASK
    head = HEADER.pack(
        question.id, flags, 1 if question.text else 0, answers, authorities, additionals + (1 if edns else 0)
    )
    return b"".join((head, question.text, body, edns))


def name_text(name: str) -> bytes:
    """Return *name* as a message has it. Raises ValueError if it is too long."""
    buffer = _Buffer()
    try:
        buffer.encode_name(name)
    except dnslib.DNSError as error:
        raise ValueError(f"{name!r} is no name") from error
    return bytes(buffer.data)


# ---- answers of other servers


def relay(question: Question, message: bytes, limit_bytes: int) -> bytes:
    """Return the answer *message* of another server, which has no OPT, as one to *question*."""
    counts, body = struct.unpack_from("!3H", message, 6), message[HEADER.size + len(question.text) :]
    answer = Answer(message[3] & RCODE_MASK, RECURSION_AVAILABLE, counts, body)
    return reply(question, answer, limit_bytes)


def ttl_places(message: bytes) -> list[int]:
    """Return where *message* has the TTL of each record. Raises ValueError if it cannot be read."""
    places = []
    try:
        _, _, questions, *counts = HEADER.unpack_from(message)
        at = HEADER.size
        for index in range(questions + sum(counts)):
            while length := message[at]:
                if length > _LABEL_MAX_BYTES:  # a pointer
                    at += 1
                    break
                at += 1 + length
            at += 1
            if index < questions:
                at += 4
            else:
                places.append(at + 4)
                at += 10 + int.from_bytes(message[at + 8 : at + 10], "big")
    except (IndexError, struct.error):
        raise ValueError("the message is cut off") from None
    if at > len(message):
        raise ValueError("the message is cut off")
    return places


def answer_records(message: bytes) -> list[bytes]:
    """Return the records of the answer section of *message*, each packed so that it can stand anywhere.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return [_packed(record) for record in dnslib.DNSRecord.parse(message).rr]
    except Exception as error:  # the library raises whatever it comes across
        raise ValueError("the message cannot be read") from error


def answer_addresses(message: bytes) -> list[str]:
    """Return the addresses in the answer section of *message*. Raises ValueError if it cannot be read."""
    try:
        return [str(record.rdata) for record in dnslib.DNSRecord.parse(message).rr if record.rtype in (A, AAAA)]
    except Exception as error:  # the library raises whatever it comes across
        raise ValueError("the message cannot be read") from error


# ---- records, by the library


class _Buffer(dnslib.DNSBuffer):  # type: ignore[misc]  # has no types
    """Writes names in full: records are packed one by one, wherever they will stand in a message."""

    def encode_name(self, name: object) -> None:
        self.encode_name_nocompress(name)


@lru_cache(maxsize=32_768)
def pack_record(record: Record, ttl_s: int = TTL_S) -> bytes:
    """Return *record* as bytes that can stand anywhere in a message behind its question."""
    owner, kind, value = record
    packed = _packed(dnslib.RR(owner or ".", kind, INTERNET, ttl_s, _rdata(kind, value)))
    return packed if owner else _SAME_NAME + packed[1:]


def _packed(record: dnslib.RR) -> bytes:
    buffer = _Buffer()
    record.pack(buffer)
    return bytes(buffer.data)


def _rdata(kind: int, value: Value) -> dnslib.RD:
    match value:
        case str():
            made: dnslib.RD = getattr(dnslib, type_name(kind))(value)
            return made
        case (int(priority), int(weight), int(port), str(target)):
            return dnslib.SRV(priority, weight, port, target)
        case (str(server), str(mailbox), times):
            return dnslib.SOA(server, mailbox, times)
    raise AssertionError(value)
