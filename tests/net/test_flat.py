"""Descriptors and memory of the proxy's processes after very many connections: no connection may leave a trace."""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from tests.net.world import Proxy, background_requests, serve_web, wait_until
from userspace_proxy.lab import ServiceLab, connect

SERVICE_IP = "10.96.4.1"
# Eight bytes for each connection of the long run would be more than this.
GROWTH_MAX_BYTES = 1_500_000
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Usage:
    """The open descriptors of one process, and its share of memory."""

    descriptors: int
    pss_bytes: int


def usage(pid: int) -> Usage:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    kilobytes = re.findall(r"^Pss: +(\d+) kB$", text, re.MULTILINE)[0]
    return Usage(len(list(Path(f"/proc/{pid}/fd").iterdir())), int(kilobytes) * 1024)


class Clients:
    """wrk, which opens a connection for each request, and beside it clients that half-close, upload, or reset."""

    def __init__(self, proxy: Proxy, world: ServiceLab) -> None:
        self._proxy = proxy
        self._client = world.client
        self._manners = count()

    @property
    def connections(self) -> int:
        return int(self._proxy.metric("userspace_proxy_connections_total", service="web"))

    def connect(self, connections: int, wrk_s: int) -> None:
        """Let clients come until there have been so many *connections* more; then wait until all have ended."""
        enough = self.connections + connections
        with background_requests(self._mannered) as outcomes:
            while self.connections < enough:
                options = ["-t1", "-c32", f"-d{wrk_s}s", "--timeout", "8s", "-H", "Connection: close"]
                said = self._client.run("wrk", *options, f"http://{SERVICE_IP}/").stdout
                assert "Socket errors" not in said, said
        failed = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        assert not failed
        assert outcomes
        wait_until(lambda: not self._proxy.metric("userspace_proxy_connections_open_all"), "all connections have ended")

    def _mannered(self) -> None:
        manner = next(self._manners) % 3
        with connect(self._client, SERVICE_IP, 80) as sock:
            if manner == 0:  # reset in the middle of a request
                sock.sendall(b"GET / HT")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                return
            body = b"x" * (0 if manner == 1 else 300_000)
            head = f"POST / HTTP/1.1\r\nHost: web\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
            sock.sendall(head.encode() + body)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1 << 16):
                pass


@pytest.fixture
def short_tracking(world: ServiceLab) -> Iterator[None]:
    """Shorten the node's connection tracking, whose memory all namespaces share: it soon forgets ended connections."""
    world.node.set_knob("netfilter/nf_conntrack_tcp_timeout_time_wait", 1)
    yield
    world.node.set_knob("netfilter/nf_conntrack_tcp_timeout_time_wait", 120)


@pytest.mark.usefixtures("short_tracking")
@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
@pytest.mark.parametrize(
    ("warm_up", "connections", "wrk_s"),
    [(1_000, 2_000, 1), pytest.param(20_000, 200_000, 5, marks=[pytest.mark.soak, pytest.mark.timeout(600)])],
)
def test_descriptors_and_memory_of_both_processes_are_flat(
    fresh_proxy: Proxy, world: ServiceLab, loop: str, warm_up: int, connections: int, wrk_s: int
) -> None:
    fresh_proxy.loop = loop
    fresh_proxy.verbose = False
    serve_web(fresh_proxy)
    fresh_proxy.start()
    assert fresh_proxy.process is not None
    processes = {"control": fresh_proxy.process.pid, "worker": fresh_proxy.workers()[0]}
    clients = Clients(fresh_proxy, world)
    clients.connect(warm_up, wrk_s)
    before = {name: usage(pid) for name, pid in processes.items()}

    clients.connect(connections, wrk_s)

    def descriptors() -> dict[str, int]:
        return {name: usage(pid).descriptors for name, pid in processes.items()}

    allowed = {name: used.descriptors for name, used in before.items()}
    wait_until(lambda: descriptors() == allowed, "all descriptors are closed")
    growth = {name: usage(pid).pss_bytes - before[name].pss_bytes for name, pid in processes.items()}
    assert max(growth.values()) < GROWTH_MAX_BYTES, growth
    assert fresh_proxy.metric("userspace_proxy_failed_connections_total") == 0
    assert fresh_proxy.stop() == 0
