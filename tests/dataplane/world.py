"""A data plane in this process and what is around it: portals, and endpoints that answer, refuse or vanish."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tests.modes.redirect_cases import Redirects
from userspace_proxy.dataplane.connections import Limits
from userspace_proxy.dataplane.plane import LocalPlane
from userspace_proxy.lab import ip
from userspace_proxy.model.access_record import AccessRecord
from userspace_proxy.model.counters import Counters, EndpointCounters
from userspace_proxy.model.endpoint import Address, Endpoint
from userspace_proxy.model.listeners import Backends, ListenerSpec
from userspace_proxy.model.names import L4Protocol, ListenerName, NamespacedName, ServicePortName
from userspace_proxy.model.service import Balance, ConnectionPolicy, ServicePort, SourceIP, Weights, portals
from userspace_proxy.modes.userspace import nft
from userspace_proxy.netfilter.nft_text import removal

TCP_PORT, UDP_PORT, OTHER_PORT = 10_001, 10_002, 10_003
# A foreign NAT rule leads from here to our proxy port.
FOREIGN = ("10.99.0.1", 81)
# Clients that are told apart by their address, and backends whose packets can be made to vanish.
CLIENT_IPS = ("10.98.0.1", "10.98.0.2", "10.98.0.3")
CLIENT_IP6 = "fd00:98::1"
VANISHING_IPS = ("10.97.0.1", "10.97.0.2", "10.97.0.3")

NAME = ServicePortName(NamespacedName("shop", "web"), "http", L4Protocol.TCP)
UDP_NAME = ServicePortName(NamespacedName("shop", "dns"), "dns", L4Protocol.UDP)
OTHER_NAME = ServicePortName(NamespacedName("shop", "other"), "http", L4Protocol.TCP)
LISTENER, UDP_LISTENER, OTHER_LISTENER = ListenerName(NAME), ListenerName(UDP_NAME), ListenerName(OTHER_NAME)
PORTAL = ("10.96.0.1", 80)
OTHER_PORTAL = ("10.96.0.2", 80)
PORTAL6 = ("fd00:96::1", 80)
NODE_PORT = 30_080

_VANISH = "inet vanish"
_FOREIGN = "ip foreign"


def service_port(affinity_timeout_s: int | None = None) -> ServicePort:
    return ServicePort(NAME, 80, (PORTAL[0], PORTAL6[0]), NODE_PORT, affinity_timeout_s=affinity_timeout_s)


def other_service_port() -> ServicePort:
    return ServicePort(OTHER_NAME, 80, (OTHER_PORTAL[0],))


def udp_service_port(affinity_timeout_s: int | None = None) -> ServicePort:
    return ServicePort(UDP_NAME, 53, (PORTAL[0], PORTAL6[0]), affinity_timeout_s=affinity_timeout_s)


def _nft(script: str) -> None:
    subprocess.run(["nft", "-f", "-"], input=script, text=True, check=True, timeout=30)


@contextlib.contextmanager
def surroundings() -> Iterator[None]:
    """Addresses, routes to the portals, and the redirect rules of our services, in the namespace of the tests."""
    addresses = [f"{address}/32" for address in CLIENT_IPS + VANISHING_IPS] + [f"{CLIENT_IP6}/128"]
    routes = ["10.96.0.0/16", "10.99.0.0/16", "fd00:96::/64"]
    for address in addresses:
        ip("address", "add", address, "dev", "lo")
    for route in routes:
        ip("-6" if ":" in route else "-4", "route", "add", route, "dev", "lo")
    # If a client's port is used again while its last connection rests, NAT gives the new one another source port.
    Path("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_time_wait").write_text("1")
    specs = ((service_port(), TCP_PORT), (udp_service_port(), UDP_PORT), (other_service_port(), OTHER_PORT))
    ports = {portal: proxy_port for known, proxy_port in specs for portal in portals(known)}
    _nft(Redirects(ports).nft())
    _nft(
        f"table {_FOREIGN} {{ chain output {{ type nat hook output priority -110; "
        f"ip daddr {FOREIGN[0]} tcp dport {FOREIGN[1]} redirect to :{TCP_PORT}; }}; }}\n"
        f"table {_VANISH} {{ set ips {{ type ipv4_addr; }}; chain input {{ type filter hook input priority 0; "
        "ip daddr @ips drop; ip saddr @ips drop; }; }\n"
    )
    try:
        yield
    finally:
        _nft(f"delete table {_VANISH}\ndelete table {_FOREIGN}\n{removal(nft.TABLE)}")
        for route in routes:
            ip("-6" if ":" in route else "-4", "route", "del", route, "dev", "lo")
        for address in addresses:
            ip("address", "del", address, "dev", "lo")


@contextlib.contextmanager
def vanished(*addresses: str) -> Iterator[None]:
    """No packet to or from *addresses* arrives."""
    _nft(f"add element {_VANISH} ips {{ {', '.join(addresses)} }}\n")
    try:
        yield
    finally:
        _nft(f"flush set {_VANISH} ips\n")


@contextlib.contextmanager
def forbidden(*addresses: str) -> Iterator[None]:
    """A firewall of this host drops what is sent to *addresses*: the call fails with EPERM."""
    table = "inet forbid"
    _nft(
        f"table {table} {{ chain output {{ type filter hook output priority 0; "
        f"ip daddr {{ {', '.join(addresses)} }} drop; }}; }}\n"
    )
    try:
        yield
    finally:
        _nft(f"delete table {table}\n")


class NamedBackend:
    """Sends its name to every client and closes; runs in a thread, so that no event loop of a test is involved."""

    def __init__(self, name: str, address: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        self.name = name.encode()
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._listener = socket.create_server(address, family=family, backlog=1024)
        self.endpoint = Endpoint(*self._listener.getsockname()[:2])
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client, contextlib.suppress(OSError):
                client.sendall(self.name)

    def close(self) -> None:
        # A close alone would not wake the thread.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._listener.close()


@contextlib.contextmanager
def named_backends(*names: str) -> Iterator[tuple[NamedBackend, ...]]:
    backends = tuple(NamedBackend(name) for name in names)
    try:
        yield backends
    finally:
        for backend in backends:
            backend.close()


def refusing_endpoint(address: str = "127.0.0.1") -> Endpoint:
    """Return an endpoint without a listener, at a port that no ended connection occupies either."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as sock:
        sock.bind((address, 0))  # without SO_REUSEADDR
        return Endpoint(*sock.getsockname()[:2])


class Plane:
    """A data plane with one TCP and one UDP service port."""

    def __init__(self, limits: Limits, now: Callable[[], float] | None, affinity_timeout_s: int | None) -> None:
        self.records: list[AccessRecord] = []
        self.on_record: Callable[[], None] = lambda: None
        self.local = LocalPlane(limits, self._record, now or time.monotonic)
        self.specs = [
            ListenerSpec(service_port(affinity_timeout_s), TCP_PORT),
            ListenerSpec(udp_service_port(affinity_timeout_s), UDP_PORT),
        ]

    def _record(self, record: AccessRecord) -> None:
        self.records.append(record)
        self.on_record()

    async def use(self, *usable: Endpoint, serving: Sequence[Endpoint] | None = None) -> None:
        """Give both service ports these endpoints."""
        backends = Backends(usable, tuple(usable if serving is None else serving))
        await self.local.update({LISTENER: backends, UDP_LISTENER: backends})

    async def tell_sources_by(self, source_ip: SourceIP) -> None:
        """Set how endpoints see their clients from now on."""
        self.specs = [replace(s, service_port=replace(s.service_port, source_ip=source_ip)) for s in self.specs]
        assert await self.local.open(self.specs) == {}

    async def balance(self, balance: Balance, weights: Weights = (), slow_start_s: float = 0.0) -> None:
        """Choose endpoints by this algorithm from now on."""
        self.specs = [
            replace(
                spec,
                service_port=replace(spec.service_port, balance=balance, weights=weights, slow_start_s=slow_start_s),
            )
            for spec in self.specs
        ]
        assert await self.local.open(self.specs) == {}

    async def apply(self, policy: ConnectionPolicy) -> None:
        """Let the TCP service port have *policy* from now on."""
        tcp, udp = self.specs
        self.specs = [replace(tcp, service_port=replace(tcp.service_port, connections=policy)), udp]
        assert await self.local.open(self.specs) == {}

    async def counters(self, name: ServicePortName = NAME) -> Counters:
        return (await self.local.stats()).services[name]

    async def of_endpoints(self, name: ServicePortName = NAME) -> dict[Address, EndpointCounters]:
        return dict((await self.local.stats(endpoints_max=100)).endpoints.get(name, {}))

    async def connections_open(self) -> int:
        return (await self.local.stats()).connections_open


@contextlib.asynccontextmanager
async def running_plane(
    limits: Limits | None = None,
    *,
    now: Callable[[], float] | None = None,
    affinity_timeout_s: int | None = None,
) -> AsyncIterator[Plane]:
    plane = Plane(limits or Limits(), now, affinity_timeout_s)
    try:
        assert await plane.local.open(plane.specs) == {}
        yield plane
    finally:
        await plane.local.close(0)
