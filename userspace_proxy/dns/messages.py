"""DNS messages as bytes: questions are read and records packed here; answers of other servers are read by dnslib.

No other module knows the library. Why it, and what it is not used for: docs/decisions/dns-messages.md.
"""

import contextlib
import itertools
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, Self

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
# IXFR, AXFR
_TRANSFERS = {b"\0\xfb", b"\0\xfc"}
_ECHOED = _OPCODE | RECURSION_DESIRED | 0x10  # CD, of RFC 4035
# Type, class, TTL and length of what follows.
_RECORD = struct.Struct("!HHIH")
_SRV, _SOA_TIMES = struct.Struct("!3H"), struct.Struct("!5I")
# Names, and pointers in them, that are followed in one message of another server.
_NAMES_MAX = 4_096
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
    """A resource record. ``owner``: a name without its final dot, or "" for the name in the question."""

    owner: str
    type: int
    value: Value


# Types that have a name. A client may ask for 65,536 types.
NAMED_TYPES = frozenset(dnslib.QTYPE.forward)
OTHER_TYPE = 0


def type_name(kind: int) -> str:
    return str(dnslib.QTYPE.forward.get(kind, "other"))


def rcode_name(rcode: int) -> str:
    return str(dnslib.RCODE.forward.get(rcode, rcode))


class Question(NamedTuple):
    """A query. ``text``: the question as it was sent.

    ``edns_bytes``: the largest answer that the client accepts, None without EDNS. ``error``: the response code with
    which the query is refused.
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
        """A key that is equal for equal questions, regardless of upper and lower case."""
        return self.text[:-4].lower() + self.text[-4:]

    def labels(self) -> tuple[str, ...]:
        """Return the labels of the name, in lower case."""
        text, at, found = self.text, 0, []
        while length := text[at]:
            found.append(text[at + 1 : at + 1 + length].lower().decode("latin-1"))
            at += 1 + length
        return tuple(found)


def read_question(message: bytes) -> Question | None:
    """Return the question of *message*, or None if it needs no answer: it is an answer itself, or no message."""
    if len(message) < HEADER.size:
        return None
    identity, flags, questions, answers, authorities, additionals = HEADER.unpack_from(message)
    if flags & QR:
        return None
    if flags & _OPCODE:
        return Question(identity, flags, error=NOTIMP)
    end = _end_of_question(message)
    if not end or questions != 1 or answers or authorities:
        return Question(identity, flags, error=FORMERR)
    text, edns_bytes, error = message[HEADER.size : end], None, NOERROR
    if additionals and message[end : end + 3] == _OPT:
        edns_bytes, error = _read_opt(message, end)
        if error == FORMERR:
            return Question(identity, flags, error=error)
    if text[-2:] != _INTERNET or text[-4:-2] in _TRANSFERS:
        error = REFUSED
    return Question(identity, flags, text, edns_bytes, error)


def _read_opt(message: bytes, at: int) -> tuple[int, int]:
    """Return the size of an answer that the OPT record at *at* allows, and the code to refuse it by."""
    if len(message) < at + _OPT_BYTES:
        return 0, FORMERR
    edns_bytes, _, version, _, length = _OPT_REST.unpack_from(message, at + 3)
    end = at + _OPT_BYTES + length
    # RFC 6891, 6.1.1: one OPT at most.
    if len(message) < end or message[end : end + 3] == _OPT:
        return 0, FORMERR
    return edns_bytes, BADVERS if version else NOERROR


def _end_of_question(message: bytes) -> int:
    """Return where the question ends; 0 if its name has a pointer, is too long, or is cut off."""
    at, size = HEADER.size, len(message)
    while at < size and 0 < message[at] <= _LABEL_MAX_BYTES:
        at += 1 + message[at]
    if at + 5 > size or message[at] or at - HEADER.size >= _NAME_MAX_BYTES:
        return 0
    return at + 5


# ---- answers


class PackedAnswer(NamedTuple):
    """A packed answer without its question, which each client writes in its own way.

    ``counts``: of the records in ``body``, by section. ``surplus``: packed records of the answer section, if they do
    not fit into one message; then the body is empty. ``each_bytes``: the length of each record if the body has nothing
    but addresses, so that any number of them in any order is an answer; else 0.
    """

    rcode: int
    flags: int = 0
    counts: tuple[int, int, int] = (0, 0, 0)
    body: bytes = b""
    surplus: tuple[bytes, ...] = ()
    each_bytes: int = 0

    def turned(self, by: int) -> Self:
        """Return the same addresses, of which another one is the first. Many clients use the first one only."""
        first = by % self.counts[0] * self.each_bytes
        return self._replace(body=self.body[first:] + self.body[:first])


def pack_answer(
    rcode: int,
    flags: int = 0,
    answers: Iterable[Record] = (),
    authorities: Iterable[Record] = (),
    additionals: Iterable[Record] = (),
) -> PackedAnswer:
    """Return an answer with these records. *additionals* are left out if they do not fit."""
    packed, behind = _pack(answers), _pack(authorities)
    body = b"".join(packed + behind)
    if len(body) > BODY_MAX_BYTES:
        return PackedAnswer(rcode, flags, surplus=tuple(packed))
    more = _pack(additionals)
    if len(body) + sum(map(len, more)) > BODY_MAX_BYTES:
        more = []
    return PackedAnswer(rcode, flags, (len(packed), len(behind), len(more)), body + b"".join(more))


def _pack(records: Iterable[Record]) -> list[bytes]:
    """Return *records* as bytes. One with an invalid name is left out, and the others are kept."""
    packed = []
    for record in records:
        try:
            packed.append(pack_record(record))
        except ValueError:
            continue
    return packed


def fitting(answer: PackedAnswer, first: int) -> PackedAnswer:
    """Return *answer* with as many of its surplus records as fit, from the one with index *first* on."""
    room, taken = BODY_MAX_BYTES, []
    for record in itertools.chain(answer.surplus[first:], answer.surplus[:first]):
        if (room := room - len(record)) < 0:
            break
        taken.append(record)
    return answer._replace(counts=(len(taken), 0, 0), body=b"".join(taken), surplus=())


def reply(question: Question, answer: PackedAnswer, limit_bytes: int) -> bytes:
    """Return *answer* as a message for *question*.

    If it is longer than *limit_bytes*, it has the TC flag, and as many addresses as fit for a client without TCP (RFC
    2181, 9). Other records are left out.
    """
    rcode, flags, (answers, authorities, additionals), body, surplus, each_bytes = answer
    edns = b""
    if question.edns_bytes is not None:
        edns = _ANSWER_OPT if rcode <= RCODE_MASK else _ANSWER_OPT[:5] + bytes([rcode >> 4]) + _ANSWER_OPT[6:]
    room_bytes = limit_bytes - HEADER.size - len(question.text) - len(edns)
    if surplus or len(body) > room_bytes:
        answers = max(0, room_bytes) // each_bytes if each_bytes else 0
        flags, body, authorities, additionals = flags | TRUNCATED, body[: answers * each_bytes], 0, 0
    flags |= QR | question.flags & _ECHOED | rcode & RCODE_MASK
    head = HEADER.pack(
        question.id, flags, 1 if question.text else 0, answers, authorities, additionals + (1 if edns else 0)
    )
    return b"".join((head, question.text, body, edns))


# ---- records


@lru_cache(maxsize=16_384)
def name_text(name: str) -> bytes:
    """Return *name* in wire format, not compressed. Raises ValueError if *name* is no domain name."""
    labels = [label.encode("ascii") for label in name.removesuffix(".").split(".")]
    text = b"".join([bytes([len(label)]) + label for label in labels]) + b"\0"
    if len(text) > _NAME_MAX_BYTES or not all(0 < len(label) <= _LABEL_MAX_BYTES for label in labels):
        raise ValueError(f"{name!r} is no name")
    return text


def pack_record(record: Record) -> bytes:
    """Return *record* as bytes that can stand anywhere in a message behind its question."""
    owner, kind, value = record
    match value:
        case (priority, weight, port, str(target)):
            content = _SRV.pack(priority, weight, port) + name_text(target)
        case (str(server), str(mailbox), times):
            content = name_text(server) + name_text(mailbox) + _SOA_TIMES.pack(*times)
        case str() if kind in (A, AAAA):
            content = socket.inet_pton(socket.AF_INET if kind == A else socket.AF_INET6, value)
        case str() if kind == TXT:
            content = bytes([len(value)]) + value.encode()
        case str():
            content = name_text(value)
    name = name_text(owner) if owner else _SAME_NAME
    return name + _RECORD.pack(kind, INTERNET, TTL_S, len(content)) + content


# ---- answers of other servers


class _Buffer(dnslib.DNSBuffer):  # type: ignore[misc]  # has no types
    """Follows a bounded number of pointers, and writes names in full: a record can then stand anywhere."""

    names_left = _NAMES_MAX

    def decode_name(self, last: int = -1) -> object:
        self.names_left -= 1
        if self.names_left < 0:
            raise ValueError("too many names and pointers")
        return super().decode_name(last)

    def encode_name(self, name: object) -> None:
        self.encode_name_nocompress(name)


def relayed(message: bytes, question_bytes: int) -> PackedAnswer:
    """Return the answer in *message* of another server, which has no OPT record, without its question."""
    counts = struct.unpack_from("!3H", message, 6)
    return PackedAnswer(message[3] & RCODE_MASK, RECURSION_AVAILABLE, counts, message[HEADER.size + question_bytes :])


def joined(aliases: Iterable[Record], message: bytes) -> PackedAnswer:
    """Return an answer with the records *aliases*, followed by those in *message*, the answer of another server.

    Raises:
        ValueError: *message* cannot be read.
    """
    with _reading(message) as (buffer, (count, *_)):
        written = _Buffer()
        for _ in range(count):
            dnslib.RR.parse(buffer).pack(written)
    answer = pack_answer(message[3] & RCODE_MASK, AUTHORITATIVE, aliases)
    return answer._replace(counts=(answer.counts[0] + count, 0, 0), body=answer.body + bytes(written.data))


def answer_addresses(message: bytes) -> list[str]:
    """Return the addresses in the answer section of *message*. Raises ValueError if *message* cannot be read."""
    with _reading(message) as (buffer, (count, *_)):
        records = [dnslib.RR.parse(buffer) for _ in range(count)]
    return [str(record.rdata) for record in records if record.rtype in (A, AAAA)]


def ttl_places(message: bytes) -> list[int]:
    """Return the offset of each record's TTL in *message*. Raises ValueError if *message* cannot be read."""
    places = []
    with _reading(message) as (buffer, counts):
        for _ in range(sum(counts)):
            buffer.decode_name()
            places.append(buffer.offset + 4)
            buffer.get(8)
            buffer.get(*buffer.unpack("!H"))
    return places


@contextlib.contextmanager
def _reading(message: bytes) -> Iterator[tuple[_Buffer, tuple[int, int, int]]]:
    """Enter with *message* read up to its records, and the counts of these. Errors become ValueError."""
    try:
        buffer = _Buffer(message)
        header = dnslib.DNSHeader.parse(buffer)
        for _ in range(header.q):
            dnslib.DNSQuestion.parse(buffer)
        yield buffer, (header.a, header.auth, header.ar)
    except Exception as error:  # the library raises whatever it comes across
        raise ValueError("the message cannot be read") from error
