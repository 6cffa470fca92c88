"""Probes in a history: what the probed hosts answer, and what the documentation promises to follow from it.

The promises are those of docs/how-to/probe-endpoints.md and of the annotation `health-check`:

1. An endpoint that fails its probes is unhealthy after ``interval`` x ``fall`` + ``timeout``, a new one after its first
   probe. One that passes them again is healthy after ``interval`` x ``rise`` + ``timeout``. Both in steps of 100 ms.
   Neither happens before so many probes in a row have failed, or succeeded.
2. An unhealthy endpoint gets no new connection and no datagram. If all are unhealthy, all are used, or none.
3. An endpoint is probed once in an interval, and not any more when it has left. A server never sees a TCP probe.
"""

from __future__ import annotations

import contextlib
import errno
import math
import socket
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from random import Random
from types import MappingProxyType

from tests.simulation.kernel import Address, Datagram, Kernel, Stream
from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.names import NamespacedName, ServicePortName
from userspace_proxy.model.probe import EndpointCondition, EndpointHealth, ProbeKind, ProbeSpec
from userspace_proxy.model.service import ServicePort
from userspace_proxy.model.state import ProxyState
from userspace_proxy.probes.filter import HealthFilter
from userspace_proxy.probes.prober import TICK_S

# What an endpoint answers to probes, by the kinds of probes that then fail.
_FAILING: Mapping[str, frozenset[ProbeKind]] = {
    "answer": frozenset(),
    "slow": frozenset(),  # in time
    "late": frozenset(ProbeKind),
    "refuse": frozenset(ProbeKind),
    "unreachable": frozenset(ProbeKind),
    "vanish": frozenset(ProbeKind),
    "stall": frozenset({ProbeKind.HTTP, ProbeKind.UDP}),
    "error": frozenset({ProbeKind.HTTP, ProbeKind.UDP}),
    "garbage": frozenset({ProbeKind.HTTP, ProbeKind.UDP}),
    "reset": frozenset({ProbeKind.HTTP, ProbeKind.UDP}),
    "close": frozenset({ProbeKind.HTTP, ProbeKind.UDP}),
}
ANSWERS = tuple(_FAILING)
FAULTS = frozenset(f"probe-{answer}" for answer in ANSWERS[1:]) | {"unhealthy", "healthy-again", "all-unhealthy"}
_PORT = 8_081
_CODES = {"refuse": errno.ECONNREFUSED, "reset": errno.ECONNREFUSED, "unreachable": errno.EHOSTUNREACH}
_LATE_S = 0.3  # how long after a time-out an answer comes
# A socket is closed at the end of its turn, and timers are a little late.
_SOON_S = 0.001
# Until a verdict is in force: a probe and its time-out begin a step late, and endpoints are sent to the data plane.
_IN_FORCE_S = 2 * TICK_S + 0.07


@dataclass(slots=True)
class Probed:
    """An endpoint with one check, as it is known from outside.

    ``is_new``: it has not changed since it is probed. ``in_a_row``: its latest probes that have the same result; fewer
    than 0 if they failed. ``is_healthy``: the verdict of the prober.
    """

    spec: ProbeSpec
    fails: bool
    since: float
    is_new: bool = True
    is_healthy: bool = True
    has_passed: bool = False
    in_a_row: int = 0
    first_at: float = 0.0
    begun: int = 0
    probed_at: float = -math.inf
    probe: Stream | Datagram | None = None

    def verdict(self, now: float) -> bool | None:
        """Return whether the endpoint is healthy for certain, or None if that depends on the order of events."""
        spec = self.spec
        count = (1 if self.is_new else spec.fall) if self.fails else (0 if self.is_new else spec.rise)
        within_s = count * spec.interval_s + (spec.timeout_s if count else 0.0) + _IN_FORCE_S
        return not self.fails if now > self.since + within_s else None

    def note_probe(self, *, fails: bool) -> None:
        self.has_passed |= not fails
        self.in_a_row = min(self.in_a_row, 0) - 1 if fails else max(self.in_a_row, 0) + 1

    def may_be(self, *, healthy: bool) -> bool:
        """Return whether enough probes in a row have had the same result for a new verdict."""
        if healthy:
            return self.in_a_row >= self.spec.rise
        return -self.in_a_row >= (self.spec.fall if self.has_passed else 1)

    @property
    def longest_s(self) -> float:
        return max(self.spec.rise, self.spec.fall) * self.spec.interval_s + self.spec.timeout_s + _IN_FORCE_S


class Probing:
    """The probes of a history. *broken*: where broken promises are added.

    *answer_of* returns what the host with an IP address answers to probes, *in_force* the endpoints that the data plane
    has for a service port. *count* counts what happens.
    """

    def __init__(
        self,
        kernel: Kernel,
        names: tuple[ServicePortName, ...],
        *,
        answer_of: Callable[[str], str],
        in_force: Callable[[ServicePortName], Collection[Address]],
        count: Callable[[str], None],
        broken: list[str],
        may_skip: bool,
    ) -> None:
        self._kernel = kernel
        self._answer_of, self._in_force = answer_of, in_force
        self._count, self._broken = count, broken
        self._may_skip = may_skip  # this host may be short of descriptors or ports
        self.specs = dict(zip(names, _draw_specs(kernel.random), strict=True)) if names else {}
        self._wanted: tuple[Address, ...] = ()
        self._probed: dict[tuple[str, int, ProbeSpec], Probed] = {}  # by host, its port, and check
        self._is_suspended = False

    # ---- what is probed

    @property
    def has_own_port(self) -> bool:
        """Whether probes go to another port than connections."""
        return any(spec is not None and spec.port for spec in self.specs.values())

    def want(self, wanted: Collection[Address], *, anew: bool = False) -> None:
        """Set the endpoints that are probed to *wanted*. *anew*: a hand-over has started all probes again."""
        before = {} if anew else self._probed
        self._wanted, self._probed = tuple(wanted), {}
        for ip, port in wanted:
            for spec in filter(None, self.specs.values()):
                key = self._key((ip, spec.port or port), spec)
                fails = spec.kind in _FAILING[self._answer_of(ip)]
                self._probed[key] = before.get(key) or Probed(spec, fails, self._kernel.now)
        self._look_later()

    def suspend(self) -> None:
        """Note that no process probes until the next `want`."""
        self._probed = {}

    def note_answer(self, ip: str, answer: str) -> None:
        """The host *ip* answers otherwise from now on."""
        for (its_ip, _, _), probed in self._probed.items():
            fails = probed.spec.kind in _FAILING[answer]
            if its_ip == ip and fails != probed.fails:
                probed.fails, probed.since, probed.is_new = fails, self._kernel.now, False
        self._look_later()

    def _key(self, address: Address, spec: ProbeSpec) -> tuple[str, int, ProbeSpec]:
        return *address, replace(spec, panic=True)

    def _look_later(self) -> None:
        for within_s in {probed.longest_s for probed in self._probed.values()}:
            self._kernel.call_later(within_s + 0.01, self.look)

    # ---- promises

    def is_barred(self, name: ServicePortName, address: Address) -> bool:
        """Return whether *address* must not get new connections of *name* now."""
        verdicts = self._verdicts(name)
        return verdicts.get(address) is False and (True in verdicts.values() or not self._panics(name))

    def look(self) -> None:
        """Check that the data plane has the right endpoints now."""
        for name, spec in self.specs.items():
            verdicts = self._verdicts(name)
            if spec is None or not verdicts:
                continue
            used = set(self._in_force(name))
            if not any(verdict is not False for verdict in verdicts.values()):
                self._count("all-unhealthy")
                if used != (set(verdicts) if spec.panic else set()):
                    self._broken.append(f"all endpoints are unhealthy, but these are used: {used}, {spec}")
                continue
            for address, verdict in verdicts.items():
                self._note_verdict(address, spec, verdict)
                if verdict is True and address not in used:
                    self._broken.append(f"a healthy endpoint is not used: {address}, {self._kernel.now}")
                if address in used and self.is_barred(name, address):
                    self._broken.append(f"an unhealthy endpoint is used: {address}, {self._kernel.now}")

    def check_verdicts(self, name: ServicePortName, known: Mapping[Address, EndpointHealth]) -> None:
        """Check the verdicts of the prober on endpoints of *name* that are new."""
        spec = self.specs.get(name)
        if spec is None or not self._probed:
            return
        for address, health in known.items():
            probed, is_healthy = self._of(address, spec), health.condition is EndpointCondition.HEALTHY
            if is_healthy != probed.is_healthy and not probed.may_be(healthy=is_healthy):
                self._broken.append(f"a verdict comes too early: {address}, {health}, {probed}")
            probed.is_healthy = is_healthy

    def _note_verdict(self, address: Address, spec: ProbeSpec, verdict: bool | None) -> None:
        if verdict is False:
            self._count("unhealthy")
        elif verdict and not self._of(address, spec).is_new:
            self._count("healthy-again")

    def _of(self, address: Address, spec: ProbeSpec) -> Probed:
        """Return what is known of the endpoint at *address*, probed as *spec* says."""
        return self._probed[self._key((address[0], spec.port or address[1]), spec)]

    def _panics(self, name: ServicePortName) -> bool:
        spec = self.specs[name]
        return spec is None or spec.panic

    def _verdicts(self, name: ServicePortName) -> dict[Address, bool | None]:
        """Return the verdict that each endpoint must have; nothing if none is promised."""
        spec = self.specs[name]
        if spec is None or not self._probed:
            return {}
        found = {address: self._of(address, spec) for address in self._wanted}
        verdicts = {address: probed.verdict(self._kernel.now) for address, probed in found.items()}
        if self._may_skip:  # an endpoint that has always answered is healthy all the same
            return {a: v if v and found[a].is_new else None for a, v in verdicts.items()}
        return verdicts

    # ---- probes that arrive

    def connect(self, sock: Stream, address: Address) -> int:
        """A probe over TCP begins. Return the error that connect(2) gives at once, or EINPROGRESS."""
        kernel, (probed, answer) = self._kernel, self._begin(sock, address)
        if probed is None or answer == "unreachable":
            return errno.EHOSTUNREACH
        round_trip_s = 2 * kernel.latency_s
        if answer == "refuse":
            kernel.call_later(round_trip_s, lambda: sock.fail(errno.ECONNREFUSED))
        elif answer != "vanish":
            is_tcp = probed.spec.kind is ProbeKind.TCP
            delay_s = _delay_s(probed.spec, answer) if is_tcp else 0.0
            far = Stream(kernel, local=False)
            server = Server(kernel, far, answer, 0.0 if is_tcp else _delay_s(probed.spec, answer))
            sock.on_ack = self._note_seen if is_tcp else server.begin
            kernel.call_later(round_trip_s + delay_s, lambda: _establish(sock, far))
        return errno.EINPROGRESS

    def ask(self, sock: Datagram, data: bytes) -> None:
        """A probe over UDP arrives."""
        assert sock.address is not None
        kernel, (probed, answer) = self._kernel, self._begin(sock, sock.address)
        round_trip_s = 2 * kernel.latency_s
        if answer in _CODES:
            kernel.call_later(round_trip_s, lambda: sock.fail(_CODES[answer]))
        elif probed is not None and answer not in ("vanish", "stall", "close"):
            said = b"pong" if answer in ("answer", "slow", "late") else b"what?"
            if data != probed.spec.send:
                self._broken.append(f"a probe sends {data!r}")
            kernel.call_later(round_trip_s + _delay_s(probed.spec, answer), lambda: sock.arrive(b"a " + said))

    def _begin(self, sock: Stream | Datagram, address: Address) -> tuple[Probed | None, str]:
        """Note that a probe begins. Return the probed endpoint, and what it answers."""
        now = self._kernel.now
        is_udp = isinstance(sock, Datagram)
        due = [
            probed
            for (*its, spec), probed in self._probed.items()
            if tuple(its) == address and (spec.kind is ProbeKind.UDP) == is_udp
        ]
        answer = self._answer_of(address[0])
        if not due:
            self._broken.append(f"an endpoint that has left is probed: {address}, {now}")
            return None, answer
        (probed,) = due
        if now < probed.probed_at + probed.spec.interval_s - TICK_S - _SOON_S:
            self._broken.append(f"an endpoint is probed again after {now - probed.probed_at} s: {address}")
        probed.first_at = probed.first_at or now
        if now > probed.first_at + probed.begun * probed.spec.interval_s + TICK_S + _SOON_S and not self._may_skip:
            self._broken.append(f"probes of an endpoint are late: {address}, {probed.begun}, {now - probed.first_at}")
        probed.begun += 1
        if (before := probed.probe) is not None and not before.closed:
            self._kernel.call_later(_SOON_S, lambda: self._note_open(before, address))
        probed.probed_at, probed.probe = now, sock
        probed.note_probe(fails=probed.spec.kind in _FAILING[answer])
        self._count(f"probe-{answer}")
        return probed, answer

    def _note_open(self, before: Stream | Datagram, address: Address) -> None:
        if not before.closed:
            self._broken.append(f"an endpoint has two probes: {address}")

    def _note_seen(self) -> None:
        self._broken.append("a server has seen a TCP probe")


class Server:
    """The far end of an HTTP probe."""

    def __init__(self, kernel: Kernel, sock: Stream, answer: str, delay_s: float) -> None:
        self._kernel, self._sock = kernel, sock
        self._answer, self._delay_s = answer, delay_s
        self._request = b""

    def begin(self) -> None:
        self._sock.on_events = self._on_events
        if self._answer == "garbage":
            self._sock.send(b"SSH-2.0-OpenSSH_9.9\r\n")
        self._on_events()

    def _on_events(self) -> None:
        sock, had = self._sock, self._request
        with contextlib.suppress(OSError):
            while piece := sock.recv(1 << 12):
                self._request += piece
        if sock.dead or sock.ended:
            sock.close()
        elif self._request.endswith(b"\r\n\r\n") and self._request != had:
            self._kernel.call_later(self._delay_s, self._reply)

    def _reply(self) -> None:
        sock, answer = self._sock, self._answer
        if sock.closed or sock.dead or answer in ("stall", "garbage"):
            return
        if answer == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"")
        if answer in ("reset", "close"):
            sock.close()
            return
        status = b"503 Service Unavailable" if answer == "error" else b"204 No Content"
        is_asked = self._request.startswith(b"GET /healthz HTTP/1.1\r\nHost: ")
        sock.send(b"HTTP/1.1 ")
        later = (status if is_asked else b"400 Bad Request") + b"\r\n\r\n"
        self._kernel.call_later(0.001, lambda: self._finish(later))

    def _finish(self, later: bytes) -> None:
        with contextlib.suppress(OSError):  # closed meanwhile
            self._sock.send(later)


def desired_state(ports: Mapping[ServicePortName, ServicePort], addresses: Collection[Address]) -> ProxyState:
    """Return the state in which all of *ports* have endpoints at *addresses*."""
    endpoints = tuple(
        Endpoint(ip, port, node_name=f"node-{ip}", zone_hints=("east", ip), node_hints=(ip,)) for ip, port in addresses
    )
    return ProxyState(MappingProxyType(dict(ports)), MappingProxyType(dict.fromkeys(ports, endpoints)))


def new_filter(on_change: Callable[[], None], broken: list[str]) -> HealthFilter:
    """Return a health filter whose warnings are checked."""

    def warn(service: NamespacedName, reason: str, note: str) -> None:
        if reason != "EndpointsUnhealthy":
            broken.append(f"a strange warning: {service}, {reason}, {note}")

    return HealthFilter(on_change, warn)


def _establish(sock: Stream, far: Stream) -> None:
    if not sock.closed:
        far.connected = True
        far.join(sock)
        sock.establish()


def _delay_s(spec: ProbeSpec, answer: str) -> float:
    """Return how long the host waits before it answers."""
    return {"slow": spec.timeout_s / 4, "late": spec.timeout_s + _LATE_S}.get(answer, 0.0)


def _draw_specs(draw: Random) -> tuple[ProbeSpec | None, ProbeSpec | None]:
    """Return the checks of the TCP and of the UDP service port: the second may be the same, another, or none."""
    interval_s = draw.choice((0.5, 1.0))
    of_tcp = ProbeSpec(
        draw.choice((ProbeKind.TCP, ProbeKind.HTTP, ProbeKind.HTTP)),
        port=draw.choice((0, _PORT)),
        path="/healthz",
        statuses=(200, 299),
        interval_s=interval_s,
        timeout_s=draw.choice((0.4, interval_s)),
        rise=draw.randint(1, 3),
        fall=draw.randint(1, 3),
        panic=draw.random() < 0.5,
    )
    of_udp = replace(of_tcp, kind=ProbeKind.UDP, send=b"ping", expect=b"pong")
    return of_tcp, draw.choice((of_tcp, of_udp, None))
