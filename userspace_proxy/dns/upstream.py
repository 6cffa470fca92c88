"""Ask other servers for names outside of the cluster domain.

Memory is bounded whatever clients ask: equal questions are asked once, and both the number of outstanding questions and
the cache have a limit. A forwarding loop therefore ends in a time-out. The number of queries is bounded, too: failures
are cached (RFC 9520), and a server that refuses every question is not asked for a moment.
"""

import asyncio
import contextlib
import logging
import secrets
import socket
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from userspace_proxy.dns.messages import (
    HEADER,
    NOERROR,
    NXDOMAIN,
    RCODE_MASK,
    RECURSION_DESIRED,
    REFUSED,
    TRUNCATED,
    ttl_places,
)

# All tries together: below the two seconds after which clients ask again.
_TRIES_S = 1.7
SERVERS_MAX = 3  # as the C library (MAXNS in resolv.h)
_UNDER_WAY_MAX = 1_000
_CACHED_MAX, _CACHED_BYTES = 4_096, 4_096
# As the Corefile of kubeadm.
_CACHED_S = 30
# A question that failed is not asked again for this time (RFC 9520, 3.2).
_FAILED_S = 1.0
# After so many refusals in a row a server gets one question in this time.
_REFUSALS_MAX = 16
_REST_S = 1.0
_LOOK_EVERY_S = 5.0
_PORT = 53
_HINFO_INTERNET = b"\0\x0d\0\1"

log = logging.getLogger(__name__)


class _Cached(NamedTuple):
    """A cached answer. ``message``: b"" if no server answered."""

    message: bytes
    ttl_places: Sequence[int]
    stored_at: float
    expires_at: float


class Upstream:
    """The servers for other names: *servers*, or those of the file *resolv_conf*; never one of *own*.

    ``probe``: a question that only this process asks; if it comes back, the server notes a loop (`note_loop`).
    ``loops``: it came back. It is then asked again until it does not.
    """

    def __init__(self, servers: Sequence[str] | None, resolv_conf: str, own: Sequence[str]) -> None:
        self._given = servers
        self._resolv_conf = Path(resolv_conf)
        self._own = own
        self._servers: list[str] = []
        self._under_way: dict[bytes, asyncio.Task[bytes | None]] = {}
        self._cache: dict[bytes, _Cached] = {}
        self._refusals: Counter[str] = Counter()  # in a row, by server
        self._rests_until: dict[str, float] = {}
        self.probe = b""
        self.loops = False
        self._came_back = False
        self.totals = {"forwarded": 0, "forward_failures": 0, "forward_refused": 0, "forward_hits": 0}

    async def run(self) -> None:
        """Follow the file, and look for loops. Runs until cancelled."""
        read: Sequence[str] | None = None
        while True:
            found = self._given if self._given is not None else await asyncio.to_thread(read_servers, self._resolv_conf)
            if found != read:
                read = found
                self._servers = [ip for ip in found if ip not in self._own][:SERVERS_MAX]
                self.loops = False
                log.info("names outside of the cluster domain are asked at %s", ", ".join(self._servers) or "no server")
                if await self._look_for_loop():
                    log.error("other names are not asked for: the servers %s ask this one", ", ".join(self._servers))
            elif self.loops and not await self._look_for_loop():
                log.info("the servers %s no longer ask this one", ", ".join(self._servers))
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _look_for_loop(self) -> bool:
        """Ask the probe. Return whether it came back, also if no server answers now and it came back before."""
        label = secrets.token_hex(16).encode()
        self.probe = bytes([len(label)]) + label + b"\0" + _HINFO_INTERNET
        self._came_back, answer = False, None
        if self._servers:
            self.totals["forwarded"] += 1
            answer = await self._ask(self.probe, self.probe)
        if self._came_back or answer is not None:  # silence proves nothing
            self.loops = self._came_back
        return self.loops

    def note_loop(self) -> None:
        """Note that the probe has come back."""
        self.loops = self._came_back = True

    async def ask(self, text: bytes) -> bytes | None:
        """Return the answer to the question *text*, or None if no server gives one. The answer has another query id."""
        if (answer := self.known_answer(text)) is not None:
            return answer or None
        key = _key(text)
        task = self._under_way.get(key)
        if task is None:
            if len(self._under_way) >= _UNDER_WAY_MAX:
                self.totals["forward_refused"] += 1
                return None
            self.totals["forwarded"] += 1
            task = self._under_way[key] = asyncio.create_task(self._ask(text, key), name="ask upstream")
            task.add_done_callback(lambda _: self._under_way.pop(key, None))
        return await asyncio.shield(task)

    def known_answer(self, text: bytes) -> bytes | None:
        """Return the answer to *text* as `ask` does, b"" if there is none, or None if a server must be asked."""
        if (cached := self._cached(_key(text))) is not None:
            self.totals["forward_hits"] += 1
            return cached
        now = time.monotonic()
        if self.loops or all(self._rests_until.get(server, 0) > now for server in self._servers):
            self.totals["forward_refused"] += 1
            return b""
        return None

    async def _ask(self, text: bytes, key: bytes) -> bytes | None:
        now = time.monotonic()
        servers = [server for server in self._servers if self._rests_until.get(server, 0) <= now]
        servers *= 2 if len(servers) == 1 else 1
        answer = None
        for server in servers:
            if self._refusals[server] >= _REFUSALS_MAX:
                self._rests_until[server] = time.monotonic() + _REST_S
            with contextlib.suppress(TimeoutError, asyncio.IncompleteReadError):
                async with asyncio.timeout(_TRIES_S / len(servers)):
                    answer = await self._exchange(server, text)
                if answer is not None and answer[3] & RCODE_MASK in (NOERROR, NXDOMAIN):
                    self._keep(key, answer)
                    return answer
            if self._servers[:1] == [server]:  # the next one is asked first from now on
                self._servers.append(self._servers.pop(0))
        self.totals["forward_failures"] += answer is None
        self._keep_for(key, answer or b"", (), _FAILED_S)
        return answer

    async def _exchange(self, server: str, text: bytes) -> bytes | None:
        """Return the answer of *server*, or None if *server* gives none. Count its refusals."""
        answer = None
        with contextlib.suppress(OSError):
            answer = await exchange(server, text)
        if answer is None or answer[3] & RCODE_MASK == REFUSED:
            self._refusals[server] += 1
        else:
            del self._refusals[server]
            self._rests_until.pop(server, None)
        return answer

    def _keep(self, key: bytes, answer: bytes) -> None:
        with contextlib.suppress(ValueError):
            places = ttl_places(answer)
            if ttl_s := min((int.from_bytes(answer[at : at + 4], "big") for at in places), default=0):
                self._keep_for(key, answer, places, min(ttl_s, _CACHED_S))

    def _keep_for(self, key: bytes, answer: bytes, places: Sequence[int], seconds: float) -> None:
        if len(answer) > _CACHED_BYTES:
            return
        if len(self._cache) >= _CACHED_MAX:
            self._cache.clear()
        now = time.monotonic()
        self._cache[key] = _Cached(answer, places, now, now + seconds)

    def _cached(self, key: bytes) -> bytes | None:
        """Return the answer that is kept for *key*, with the time that it has been kept taken off its TTLs."""
        if (cached := self._cache.get(key)) is None:
            return None
        now = time.monotonic()
        if now >= cached.expires_at:
            del self._cache[key]
            return None
        message, age_s = bytearray(cached.message), int(now - cached.stored_at)
        for at in cached.ttl_places:
            message[at : at + 4] = (int.from_bytes(message[at : at + 4], "big") - age_s).to_bytes(4, "big")
        return bytes(message)


def _key(text: bytes) -> bytes:
    """Return what equal questions share, however their letters are written."""
    return text[:-4].lower() + text[-4:]


async def exchange(server: str, text: bytes) -> bytes:
    """Ask *server* by UDP, and by TCP if the answer is too long for that. Each query has a port and an id of its own.

    Raises:
        OSError, IncompleteReadError: the server cannot be asked.
    """
    query = HEADER.pack(secrets.randbits(16), RECURSION_DESIRED, 1, 0, 0, 0) + text
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET6 if ":" in server else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.connect((server, _PORT))
        await loop.sock_sendall(sock, query)
        while not _is_answer(answer := await loop.sock_recv(sock, 1 << 16), query):
            pass
    if not answer[2] & TRUNCATED >> 8:
        return answer
    reader, writer = await asyncio.open_connection(server, _PORT)
    try:
        writer.write(len(query).to_bytes(2, "big") + query)
        answer = await reader.readexactly(int.from_bytes(await reader.readexactly(2), "big"))
    finally:
        writer.close()
    if not _is_answer(answer, query):
        raise ConnectionError("the answer is to another question")
    return answer


def _is_answer(message: bytes, query: bytes) -> bool:
    end = len(query)
    same = message[HEADER.size : end].lower() == query[HEADER.size :].lower()
    return same and message[:2] == query[:2] and message[2] >> 7 == 1 and len(message) >= end


def read_servers(resolv_conf: Path) -> list[str]:
    """Return the servers that *resolv_conf* names; none if it cannot be read."""
    try:
        lines: Iterable[str] = resolv_conf.read_text(errors="replace").splitlines()
    except OSError:
        return []
    words = [line.split() for line in lines]
    return [each[1] for each in words if len(each) > 1 and each[0] == "nameserver"]
