"""The DNS process: serves at the sockets that the control process opened. It has no capabilities.

It imports nothing of the control side, so that parsing and rendering delay no answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from collections import Counter
from collections.abc import Callable

import msgspec

from userspace_proxy.dataplane.channel import LOST, Channel
from userspace_proxy.dataplane.mmsg import MESSAGES, Batch, reply_record
from userspace_proxy.dns import messages, wire
from userspace_proxy.dns.messages import EDNS_BYTES, PLAIN_BYTES, Answer, Question, read_question, reply
from userspace_proxy.dns.privileges import drop_capabilities
from userspace_proxy.dns.responder import Alias, Responder
from userspace_proxy.dns.zone import Zone

# Batches of one turn: other sockets and changes of names wait for it.
_BATCHES = 4

_requests: msgspec.msgpack.Decoder[wire.Request] = msgspec.msgpack.Decoder(wire.Request)
_encoder = msgspec.msgpack.Encoder()
log = logging.getLogger(__name__)


class DnsServer:
    """Answers at UDP and TCP sockets."""

    def __init__(self, settings: wire.DnsSettings, channel: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._responder = Responder(Zone(settings.domain, settings.addresses))
        self._inbox, self._outbox = Batch(), Batch()
        self._sockets: list[socket.socket] = []
        self._requests: Counter[tuple[str, str, int, int]] = Counter()
        self.ended = asyncio.Event()
        self._channel = Channel(channel, self._on_frame, self.ended.set)

    # ---- the control process

    def _on_frame(self, body: bytes, descriptors: list[int]) -> None:
        match _requests.decode(body):
            case wire.Sockets():
                self._serve([socket.socket(fileno=fd) for fd in descriptors if fd != LOST])
            case wire.Names(services):
                self._responder.update(services)
            case wire.Synced():
                self._responder.is_synced = True
            case wire.Ask():
                self._channel.send(_encoder.encode(self._counts()))
            case wire.Close(after_s):
                self._loop.call_later(after_s, self.ended.set)

    def _counts(self) -> wire.Counts:
        responder = self._responder
        totals = {"hits": responder.hits, "misses": responder.misses, "cut": responder.cut}
        requests = [
            (transport, family, messages.TYPE_NAMES.get(kind, "other"), messages.RCODE_NAMES.get(code, str(code)), n)
            for (transport, family, kind, code), n in self._requests.items()
        ]
        return wire.Counts(requests, totals)

    def _serve(self, sockets: list[socket.socket]) -> None:
        for sock in sockets:
            self._sockets.append(sock)
            family = "1" if sock.family == socket.AF_INET else "2"  # as CoreDNS counts them
            if sock.type == socket.SOCK_DGRAM:
                self._loop.add_reader(sock.fileno(), self._read_datagrams, sock.fileno(), family)

    # ---- answers

    def _answer(self, query: bytes, limit_bytes: int, transport: str, family: str) -> bytes | None:
        question = read_question(query)
        if question is None:
            return None
        if question.edns_bytes is not None:
            limit_bytes = max(limit_bytes, min(question.edns_bytes, EDNS_BYTES))
        answer = self._find(question)
        self._requests[transport, family, question.type, answer.rcode] += 1
        return reply(question, answer, limit_bytes)

    def _find(self, question: Question) -> Answer:
        if question.error:
            return Answer(question.error)
        try:
            answer = self._responder.answer(question)
        except Alias:
            return Answer(messages.SERVFAIL)
        return Answer(messages.REFUSED) if answer is None else answer

    def _read_datagrams(self, fd: int, family: str) -> None:
        inbox, outbox = self._inbox, self._outbox
        for _ in range(_BATCHES):
            received = replies = 0
            for record, length, content in inbox.receive(fd):
                received += 1
                answer = self._answer(bytes(content[:length]), PLAIN_BYTES, "udp", family)
                if answer is not None:
                    outbox.room[replies][: len(answer)] = answer
                    outbox.address(replies, reply_record(record), len(answer))
                    replies += 1
            if replies:
                outbox.send(fd, replies)
            if received < MESSAGES:
                return

    def close(self) -> None:
        for sock in self._sockets:
            self._loop.remove_reader(sock.fileno())
            sock.close()
        self._channel.close()


async def _serve(settings: wire.DnsSettings, channel: socket.socket) -> None:
    server = DnsServer(settings, channel)
    with contextlib.closing(server):
        await server.ended.wait()


def main(arguments: list[str]) -> None:
    """Run until the control process says so. *arguments*: a socket to it, and settings as JSON."""
    from userspace_proxy.logs import configure_logging

    channel = socket.socket(fileno=int(arguments[0]))
    settings = msgspec.json.decode(arguments[1], type=wire.DnsSettings)
    drop_capabilities()
    configure_logging(settings.log_format, verbose=settings.verbose)
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if settings.loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(_serve(settings, channel))


if __name__ == "__main__":
    main(sys.argv[1:])
