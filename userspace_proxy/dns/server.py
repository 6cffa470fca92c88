"""The DNS process: serves at the sockets that the control process opened. It has no capabilities.

It imports nothing of the control side, so that parsing and rendering delay no answer.
"""

import asyncio
import contextlib
import gc
import ipaddress
import logging
import socket
import time
from collections import Counter
from collections.abc import Coroutine
from typing import NamedTuple

import msgspec

from userspace_proxy.dataplane.begin import begin
from userspace_proxy.dataplane.channel import LOST, PING, Channel
from userspace_proxy.dataplane.mmsg import MESSAGES, Batch, client_address, interface_of, reply_record
from userspace_proxy.dns import messages, wire
from userspace_proxy.dns.messages import PackedAnswer, Question, pack_answer, read_question, reply
from userspace_proxy.dns.privileges import drop_capabilities
from userspace_proxy.dns.responder import Alias, Responder
from userspace_proxy.dns.sockets import interface_of_stream, is_alone
from userspace_proxy.dns.upstream import Upstream
from userspace_proxy.dns.zone import Zone
from userspace_proxy.model.dns_names import ServiceNames
from userspace_proxy.model.endpoint import Address
from userspace_proxy.model.names import NamespacedName

# Batches of one turn: other sockets and changes of names wait for it.
_BATCHES = 4
# Names are taken in for so long at a time. The pause keeps this process from using up its share of a busy CPU: it is
# then run at once when a query comes.
_SLICE_S, _PAUSE_S = 0.001, 0.001
# A TCP client sends a query, or takes an answer, in this time. So many may be connected, and so many of one address.
_STREAM_IDLE_S = 10.0
_STREAMS_MAX, _STREAMS_OF_CLIENT_MAX = 1_024, 128
_LOOK_EVERY_S = 0.25
_LAST_ANSWERS_S = 2.0
# Questions for other servers that are under way.
_TASKS_MAX = 2_048
# Between two bugs, or shortages, that are logged.
_BUG_PAUSE_S = 10.0
_ACCEPT_AGAIN_S = 0.5

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_decoder: msgspec.msgpack.Decoder[wire.Request] = msgspec.msgpack.Decoder(wire.Request)
_encoder = msgspec.msgpack.Encoder()
log = logging.getLogger(__name__)


class Client(NamedTuple):
    """A client of this server. ``interface``: the index of the interface that the question came in at."""

    ip: str
    transport: str
    family: str
    interface: int


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
        self._networks: list[Network] = []
        self._interface = ""
        self._inbox, self._outbox = Batch(), Batch()
        self._sockets: list[socket.socket] = []
        self._idle: dict[asyncio.StreamWriter, None] = {}  # TCP clients without a complete query, the oldest first
        self._streams: Counter[str] = Counter()
        self._requests: Counter[tuple[str, str, int, int]] = Counter()
        self._silent_until = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = asyncio.Event()
        self._is_told_to_end = False
        self._frames: asyncio.Queue[tuple[wire.Request, list[int]]] = asyncio.Queue()
        self._channel = Channel(channel, self._on_frame, self._ended.set)

    async def run(self) -> None:
        """Serve until the control process requests the end. If it dies, serve for at most ``orphan_timeout_s`` more."""
        jobs = [asyncio.create_task(job) for job in (self._upstream.run(), self._follow())]
        try:
            await self._ended.wait()
            if not self._is_told_to_end:
                await self._serve_alone()
        finally:
            for job in jobs:
                job.cancel()
            for sock in self._sockets:
                self._loop.remove_reader(sock.fileno())
                # Answers that other servers owe leave at UDP sockets. If this process served alone, the kernel would
                # lead clients of its successor here.
                if sock.type != socket.SOCK_DGRAM or not self._is_told_to_end:
                    sock.close()
            self._is_told_to_end = True
            for writer in self._idle:
                writer.close()
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=_LAST_ANSWERS_S)
            for sock in self._sockets:
                sock.close()
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
        if body == PING:
            self._channel.send(PING)
        elif isinstance(request := _decoder.decode(body), wire.EndDns):
            self._is_told_to_end = True
            self._ended.set()
        else:
            self._frames.put_nowait((request, descriptors))

    async def _follow(self) -> None:
        """Do what the control process says, in order, while queries are answered."""
        while True:
            request, descriptors = await self._frames.get()
            match request:
                case wire.Sockets():
                    for fd in descriptors:
                        if fd != LOST:
                            self._serve(socket.socket(fileno=fd))
                case wire.Names(services):
                    await self._take_in(services)
                case wire.Synced():
                    self._responder.is_synced = True
                    gc.freeze()  # what there is now stays for long
                case wire.Clients(networks, interface):
                    self._networks = [ipaddress.ip_network(text) for text in networks]
                    self._interface = interface
                case wire.Ask():
                    self._channel.send(_encoder.encode(self._counts()))

    async def _take_in(self, services: list[tuple[NamespacedName, ServiceNames | None]]) -> None:
        ends_at = time.monotonic() + _SLICE_S
        for service, names in services:
            self._responder.update(service, names)
            if time.monotonic() > ends_at:
                await asyncio.sleep(_PAUSE_S)
                ends_at = time.monotonic() + _SLICE_S

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
        self._watch(sock)

    def _watch(self, sock: socket.socket) -> None:
        if sock.fileno() < 0:
            return  # closed meanwhile
        family = "1" if sock.family == socket.AF_INET else "2"  # as CoreDNS counts them
        serve = self._read_datagrams if sock.type == socket.SOCK_DGRAM else self._accept
        self._loop.add_reader(sock.fileno(), serve, sock, family)

    def _start(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- answers

    def _answer(self, query: bytes, limit_bytes: int, transport: str, family: str) -> bytes | Pending | None:
        """Return the answer to *query*, None if none is due, or what is to be looked up elsewhere."""
        if (question := read_question(query)) is None:
            return None
        if question.edns_bytes is not None:
            limit_bytes = max(limit_bytes, min(question.edns_bytes, messages.EDNS_BYTES))
        try:
            answer = PackedAnswer(question.error) if question.error else self._responder.answer(question)
        except Alias as alias:
            return Pending(question, limit_bytes, alias)
        except Exception:
            if self._loop.time() > self._silent_until:
                self._silent_until = self._loop.time() + _BUG_PAUSE_S
                log.exception("a bug: a query cannot be answered")
            answer = PackedAnswer(messages.SERVFAIL)
        if answer is None:
            return Pending(question, limit_bytes)
        self._count(transport, family, question, answer.rcode)
        return reply(question, answer, limit_bytes)

    def _count(self, transport: str, family: str, question: Question, rcode: int) -> None:
        kind = question.type
        self._requests[transport, family, kind if kind in messages.NAMED_TYPES else messages.OTHER_TYPE, rcode] += 1

    def _answer_at_once(self, pending: Pending, client: Client) -> bytes | None:
        """Return the answer to *pending* if it is known, or if the client may not ask; None if a server is due."""
        question, _, alias = pending
        if question.key == self._upstream.probe:  # a server on the way may have written it in other letters
            self._upstream.note_loop()
        if self._may_ask(client):
            if alias or (message := self._upstream.known_answer(question.text)) is None:
                return None
            answer = messages.relayed(message, len(question.text)) if message else PackedAnswer(messages.SERVFAIL)
        elif alias:
            answer = pack_answer(messages.NOERROR, messages.AUTHORITATIVE, alias.records)
        else:
            answer = PackedAnswer(messages.REFUSED)
        return self._reply(pending, client, answer)

    async def _look_up(self, pending: Pending, client: Client) -> bytes:
        """Return the answer to a question for which other servers are asked."""
        question, _, alias = pending
        answer = PackedAnswer(messages.SERVFAIL)
        with contextlib.suppress(ValueError):  # the target is no name, or the answer cannot be read
            text = messages.name_text(alias.target) + question.text[-4:] if alias else question.text
            if (message := await self._upstream.ask(text)) is not None:
                answer = messages.joined(alias.records, message) if alias else messages.relayed(message, len(text))
        return self._reply(pending, client, answer)

    def _reply(self, pending: Pending, client: Client, answer: PackedAnswer) -> bytes:
        self._count(client.transport, client.family, pending.question, answer.rcode)
        return reply(pending.question, answer, pending.limit_bytes)

    def _may_ask(self, client: Client) -> bool:
        address = ipaddress.ip_address(client.ip)
        if address.is_loopback or any(address in network for network in self._networks):
            return True
        if not self._interface:
            return False
        with contextlib.suppress(OSError):  # the interface is gone
            name = socket.if_indextoname(client.interface)
            return name == self._interface or (
                self._interface.endswith("*") and name.startswith(self._interface.removesuffix("*"))
            )
        return False

    # ---- UDP

    def _read_datagrams(self, sock: socket.socket, family: str) -> None:
        inbox, outbox, fd = self._inbox, self._outbox, sock.fileno()
        for _ in range(_BATCHES):
            received = replies = 0
            for record, length, content in inbox.receive(fd):
                received += 1
                answer = self._answer(bytes(content[:length]), messages.PLAIN_BYTES, "udp", family)
                if isinstance(answer, Pending):
                    answer = self._answer_or_ask(answer, sock, record, family)
                if answer is not None:
                    outbox.room[replies][: len(answer)] = answer
                    outbox.address(replies, reply_record(record), len(answer))
                    replies += 1
            if replies:
                outbox.send(fd, replies)
            if received < MESSAGES:
                return

    def _answer_or_ask(self, pending: Pending, sock: socket.socket, record: bytes, family: str) -> bytes | None:
        """Return the answer if it is known; otherwise ask other servers, and send it later."""
        to = client_address(record)
        client = Client(to[0], "udp", family, interface_of(record))
        answer = self._answer_at_once(pending, client)
        if answer is None and len(self._tasks) < _TASKS_MAX:
            self._start(self._answer_later(sock, pending, client, to))
        return answer

    async def _answer_later(self, sock: socket.socket, pending: Pending, client: Client, to: Address) -> None:
        answer = await self._look_up(pending, client)
        with contextlib.suppress(OSError):
            sock.sendto(answer, to)

    # ---- TCP

    def _accept(self, listener: socket.socket, family: str) -> None:
        try:
            sock, (ip, *_) = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # another process accepted it, or the client is gone
            return
        except OSError as error:  # out of descriptors, for example
            if self._loop.time() > self._silent_until:
                self._silent_until = self._loop.time() + _BUG_PAUSE_S
                log.warning("DNS over TCP: clients cannot be accepted, retrying: %s", error.strerror)
            self._loop.remove_reader(listener.fileno())
            self._loop.call_later(_ACCEPT_AGAIN_S, self._watch, listener)
            return
        is_full = self._streams.total() >= _STREAMS_MAX
        if self._streams[ip] >= _STREAMS_OF_CLIENT_MAX or (is_full and not self._idle):
            sock.close()
            return
        if is_full:
            oldest = next(iter(self._idle))  # the one that has been idle for longest makes room
            del self._idle[oldest]
            oldest.transport.abort()
        self._streams[ip] += 1
        self._start(self._serve_stream(sock, Client(ip, "tcp", family, interface_of_stream(sock))))

    async def _serve_stream(self, sock: socket.socket, client: Client) -> None:
        try:
            reader, writer = await asyncio.open_connection(sock=sock)
            try:
                with contextlib.suppress(OSError, TimeoutError):
                    with contextlib.suppress(asyncio.IncompleteReadError):
                        while not self._is_told_to_end and await self._serve_query(reader, writer, client):
                            pass
                    writer.close()
                    async with asyncio.timeout(_STREAM_IDLE_S):
                        await writer.wait_closed()
            finally:
                writer.transport.abort()  # close() alone waits for ever for a client that reads no answers
        finally:
            self._streams[client.ip] -= 1
            if not self._streams[client.ip]:
                del self._streams[client.ip]

    async def _serve_query(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, client: Client) -> bool:
        """PackedAnswer the next query of a TCP client. Return whether another one may follow."""
        self._idle[writer] = None
        try:
            async with asyncio.timeout(_STREAM_IDLE_S):
                query = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
        finally:
            self._idle.pop(writer, None)  # it may have made room for another one
        answer = self._answer(query, messages.MESSAGE_MAX_BYTES, client.transport, client.family)
        if isinstance(answer, Pending):
            answer = self._answer_at_once(answer, client) or await self._look_up(answer, client)
        if answer is None:
            return False
        writer.write(len(answer).to_bytes(2, "big") + answer)
        async with asyncio.timeout(_STREAM_IDLE_S):
            await writer.drain()
        await asyncio.sleep(0)  # a client with many queries under way must not hold up others
        return True


async def _serve(channel: socket.socket, settings: wire.DnsSettings) -> None:
    await DnsServer(settings, channel).run()


if __name__ == "__main__":
    drop_capabilities()  # before there is another thread, which would keep its own
    begin(wire.DnsSettings, _serve)
