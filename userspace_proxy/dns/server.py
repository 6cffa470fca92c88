"""The DNS process: serves at the sockets that the control process opened. It has no capabilities.

It imports nothing of the control side, so that parsing and rendering delay no answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import logging
import socket
import sys
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import NamedTuple

import msgspec

from userspace_proxy.dataplane.channel import LOST, Channel
from userspace_proxy.dataplane.mmsg import MESSAGES, Batch, client_address, reply_record
from userspace_proxy.dns import messages, wire
from userspace_proxy.dns.messages import (
    AAAA,
    AUTHORITATIVE,
    EDNS_BYTES,
    MESSAGE_MAX_BYTES,
    NOERROR,
    PLAIN_BYTES,
    RCODE_MASK,
    REFUSED,
    SERVFAIL,
    A,
    Answer,
    Question,
    Record,
    answer_records,
    pack_answer,
    pack_record,
    read_question,
    relay,
    reply,
)
from userspace_proxy.dns.privileges import drop_capabilities
from userspace_proxy.dns.responder import Alias, Responder
from userspace_proxy.dns.sockets import is_alone
from userspace_proxy.dns.upstream import Upstream
from userspace_proxy.dns.zone import Zone
from userspace_proxy.logs import configure_logging
from userspace_proxy.model.dns_names import ServiceNames
from userspace_proxy.model.endpoint import Address, family_of
from userspace_proxy.model.names import NamespacedName

# Batches of one turn: other sockets and changes of names wait for it.
_BATCHES = 4
# A TCP client sends a query, or takes an answer, in this time. So many may be connected, and so many of one address.
_STREAM_IDLE_S = 10.0
_STREAMS_MAX, _STREAMS_OF_CLIENT_MAX = 1_024, 128
_LOOK_EVERY_S = 0.25
_PACKED_A_TURN = 100
_LAST_ANSWERS_S = 2.0
# Questions for other servers, and connections, that are under way.
_TASKS_MAX = 2_048
_GC_THRESHOLDS = (100_000, 20, 100)
# Bugs are logged once each.
_ERRORS_MAX = 100

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_decoder: msgspec.msgpack.Decoder[wire.Request] = msgspec.msgpack.Decoder(wire.Request)
_encoder = msgspec.msgpack.Encoder()
log = logging.getLogger(__name__)


class Pending(NamedTuple):
    """A question for which other servers are asked: for its name, or for the target of ``alias``."""

    question: Question
    limit_bytes: int
    alias: Alias | None = None


class DnsServer:
    """Answers at UDP and TCP sockets."""

    def __init__(self, settings: wire.DnsSettings, channel: socket.socket) -> None:
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._responder = Responder(Zone(settings.domain, settings.addresses))
        self._upstream = Upstream(settings.upstream, settings.resolv_conf, settings.addresses)
        self._clients: list[Network] = []
        self._inbox, self._outbox = Batch(), Batch()
        self._sockets: list[socket.socket] = []
        self._streams: Counter[str] = Counter()
        self._requests: Counter[tuple[str, str, int, int]] = Counter()
        self._errors: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = asyncio.Event()
        self._is_told_to_end = False
        self._channel = Channel(channel, self._on_frame, self._ended.set)

    async def run(self) -> None:
        """Serve until the control process says so, or for some time more if it is gone."""
        following = asyncio.create_task(self._upstream.run(), name="follow resolv.conf")
        try:
            await self._ended.wait()
            if not self._is_told_to_end:
                await self._serve_alone()
        finally:
            for sock in self._sockets:
                self._loop.remove_reader(sock.fileno())
                sock.close()
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=_LAST_ANSWERS_S)
            following.cancel()
            self._channel.close()

    async def _serve_alone(self) -> None:
        """Serve until another process does at the same address, or until the address is gone (`cleanup`)."""
        log.warning("the control process is gone; names are answered as they were")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.orphan_timeout_s):
                while is_alone(self._sockets):  # noqa: ASYNC110 - nothing announces it
                    await asyncio.sleep(_LOOK_EVERY_S)

    # ---- the control process

    def _on_frame(self, body: bytes, descriptors: list[int]) -> None:
        match _decoder.decode(body):
            case wire.Sockets():
                for fd in descriptors:
                    if fd != LOST:
                        self._serve(socket.socket(fileno=fd))
            case wire.Names(services):
                self._responder.update(services)
                self._start(self._pack_addresses(services))
            case wire.Synced():
                self._responder.is_synced = True
                gc.freeze()  # what there is now stays for long
            case wire.Clients(networks):
                self._clients = [ipaddress.ip_network(text) for text in networks]
            case wire.Ask():
                self._channel.send(_encoder.encode(self._counts()))
            case wire.Close():
                self._is_told_to_end = True
                self._ended.set()

    async def _pack_addresses(self, services: list[tuple[NamespacedName, ServiceNames | None]]) -> None:
        """Pack records of headless Services before a client asks: thousands at once would delay other answers."""
        hosts = (host for _, names in services if names for group in names.groups for host in group.hosts)
        for count, (_, ip) in enumerate(hosts):
            pack_record(Record("", A if family_of(ip) == 4 else AAAA, ip))
            if count % _PACKED_A_TURN == _PACKED_A_TURN - 1:
                await asyncio.sleep(0)

    def _counts(self) -> wire.Counts:
        responder = self._responder
        totals = {"hits": responder.hits, "misses": responder.misses, "cut": responder.cut, **self._upstream.totals}
        requests = [
            (transport, family, messages.type_name(kind), messages.rcode_name(code), count)
            for (transport, family, kind, code), count in self._requests.items()
        ]
        return wire.Counts(requests, totals)

    def _serve(self, sock: socket.socket) -> None:
        self._sockets.append(sock)
        family = "1" if sock.family == socket.AF_INET else "2"  # as CoreDNS counts them
        if sock.type == socket.SOCK_DGRAM:
            self._loop.add_reader(sock.fileno(), self._read_datagrams, sock, family)
        else:
            self._loop.add_reader(sock.fileno(), self._accept, sock, family)

    # ---- answers

    def _answer(self, query: bytes, limit_bytes: int, transport: str, family: str) -> bytes | Pending | None:
        """Return the answer to *query*, None if none is due, or what is to be looked up elsewhere."""
        if (question := read_question(query)) is None:
            return None
        if question.edns_bytes is not None:
            limit_bytes = max(limit_bytes, min(question.edns_bytes, EDNS_BYTES))
        try:
            answer = Answer(question.error) if question.error else self._responder.answer(question)
        except Alias as alias:
            return Pending(question, limit_bytes, alias)
        except Exception as bug:
            if (said := repr(bug)) not in self._errors and len(self._errors) < _ERRORS_MAX:
                self._errors.add(said)
                log.exception("a bug: a query cannot be answered")
            answer = Answer(SERVFAIL)
        if answer is None:
            return Pending(question, limit_bytes)
        self._requests[transport, family, question.type, answer.rcode] += 1
        return reply(question, answer, limit_bytes)

    async def _look_up(self, pending: Pending, client_ip: str, transport: str, family: str) -> bytes:
        """Return the answer to a question for which other servers are asked, if the client may."""
        question, limit_bytes, alias = pending
        if question.text == self._upstream.probe:
            self._upstream.loops = True
        message = None
        if may_ask := self._is_client(client_ip):
            with contextlib.suppress(ValueError):
                text = messages.name_text(alias.target) + question.text[-4:] if alias else question.text
                message = await self._upstream.ask(text)
        if message is not None and alias is None:
            self._requests[transport, family, question.type, message[3] & RCODE_MASK] += 1
            return relay(question, message, limit_bytes)
        answer = Answer(SERVFAIL if may_ask else REFUSED)
        if alias is not None and not may_ask:
            answer = pack_answer(NOERROR, AUTHORITATIVE, alias.records)
        elif alias is not None and message is not None:
            with contextlib.suppress(ValueError):
                answer = pack_answer(
                    message[3] & RCODE_MASK, AUTHORITATIVE, alias.records, packed_answers=answer_records(message)
                )
        self._requests[transport, family, question.type, answer.rcode] += 1
        return reply(question, answer, limit_bytes)

    def _is_client(self, ip: str) -> bool:
        address = ipaddress.ip_address(ip)
        return address.is_loopback or any(address in network for network in self._clients)

    def _start(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- UDP

    def _read_datagrams(self, sock: socket.socket, family: str) -> None:
        inbox, outbox, fd = self._inbox, self._outbox, sock.fileno()
        for _ in range(_BATCHES):
            received = replies = 0
            for record, length, content in inbox.receive(fd):
                received += 1
                answer = self._answer(bytes(content[:length]), PLAIN_BYTES, "udp", family)
                if isinstance(answer, bytes):
                    outbox.room[replies][: len(answer)] = answer
                    outbox.address(replies, reply_record(record), len(answer))
                    replies += 1
                elif answer is not None and len(self._tasks) < _TASKS_MAX:
                    self._start(self._answer_later(sock, answer, client_address(record), family))
            if replies:
                outbox.send(fd, replies)
            if received < MESSAGES:
                return

    async def _answer_later(self, sock: socket.socket, pending: Pending, client: Address, family: str) -> None:
        answer = await self._look_up(pending, client[0], "udp", family)
        with contextlib.suppress(OSError):
            sock.sendto(answer, client)

    # ---- TCP

    def _accept(self, listener: socket.socket, family: str) -> None:
        try:
            client, (ip, *_) = listener.accept()
        except OSError:
            return
        if self._streams.total() >= _STREAMS_MAX or self._streams[ip] >= _STREAMS_OF_CLIENT_MAX:
            client.close()
            return
        self._streams[ip] += 1
        self._start(self._serve_stream(client, ip, family))

    async def _serve_stream(self, sock: socket.socket, ip: str, family: str) -> None:
        try:
            reader, writer = await asyncio.open_connection(sock=sock)
            with contextlib.closing(writer), contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                while not self._is_told_to_end:
                    async with asyncio.timeout(_STREAM_IDLE_S):
                        query = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
                    answer = self._answer(query, MESSAGE_MAX_BYTES, "tcp", family)
                    if isinstance(answer, Pending):
                        answer = await self._look_up(answer, ip, "tcp", family)
                    if answer is None:
                        return
                    writer.write(len(answer).to_bytes(2, "big") + answer)
                    async with asyncio.timeout(_STREAM_IDLE_S):
                        await writer.drain()
        finally:
            self._streams[ip] -= 1
            if not self._streams[ip]:
                del self._streams[ip]


def main(arguments: list[str]) -> None:
    """Run until the control process says so. *arguments*: a socket to it, and settings as JSON."""
    channel = socket.socket(fileno=int(arguments[0]))
    settings = msgspec.json.decode(arguments[1], type=wire.DnsSettings)
    drop_capabilities()
    configure_logging(settings.log_format, verbose=settings.verbose)
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if settings.loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop

    # A full collection would stop all answers for as long as it walks over the names.
    gc.set_threshold(*_GC_THRESHOLDS)

    async def run() -> None:
        await DnsServer(settings, channel).run()

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(run())


if __name__ == "__main__":
    main(sys.argv[1:])
