"""Dials over a simulated network and clock: every mixture of endpoints, without waiting."""

from __future__ import annotations

import errno
import heapq
import itertools
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.dataplane.world import NAME
from userspace_proxy.dataplane import dial as dial_module
from userspace_proxy.dataplane.connections import Limits
from userspace_proxy.dataplane.context import Shared
from userspace_proxy.dataplane.dial import (
    _DIALS_A_TURN,
    BUDGET_S,
    DIALS_MAX,
    RACE_S,
    STARVED_MAX,
    Deadlines,
    Dial,
    deadlines,
)
from userspace_proxy.dataplane.listener import BaseListener
from userspace_proxy.dataplane.memory import EJECT_S, OVERTAKEN_MAX, Memory
from userspace_proxy.dataplane.picker import Pick
from userspace_proxy.dataplane.poller import FAILED, WRITE
from userspace_proxy.dataplane.suspects import PROOF_S
from userspace_proxy.dataplane.transparent import Transparent
from userspace_proxy.model.endpoint import Address, Endpoint
from userspace_proxy.model.listeners import ListenerSpec
from userspace_proxy.model.service import ServicePort

CLIENT = "10.1.0.1"


@dataclass
class Fate:
    """The result of a dial to an endpoint: *code* (0: it answers) after *after_s*; None: never a result."""

    after_s: float | None = None
    code: int = 0


SILENT = Fate()
NEAR = Fate(0.001)


class Network:
    """Stands for the kernel, the event loop and the poller."""

    def __init__(self, fates: dict[Address, Fate]) -> None:
        self.fates = fates
        self.now_s = 1_000.0
        self.dialled: list[Address] = []
        self.handlers: dict[FakeSocket, Callable[[int], None]] = {}
        self.most_open = 0
        self._steps: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()

    def time(self) -> float:
        return self.now_s

    def call_at(self, at: float, step: Callable[..., None], *arguments: object) -> None:
        heapq.heappush(self._steps, (at, next(self._order), step, arguments))

    def call_later(self, after_s: float, step: Callable[..., None], *arguments: object) -> None:
        self.call_at(self.now_s + after_s, step, *arguments)

    def watch(self, sock: FakeSocket, handler: Callable[[int], None]) -> None:
        self.handlers[sock] = handler
        self.most_open = max(self.most_open, len(self.handlers))
        fate = self.fates[sock.address]
        if fate.after_s is not None:
            sock.code = fate.code
            self.call_at(self.now_s + fate.after_s, self._tell, sock, FAILED if fate.code else WRITE)

    def _tell(self, sock: FakeSocket, events: int) -> None:
        if sock in self.handlers:
            self.handlers[sock](events)

    def close(self, sock: FakeSocket) -> None:
        del self.handlers[sock]

    def run(self, until: Callable[[], object]) -> None:
        while not until():
            self.now_s, _, step, arguments = heapq.heappop(self._steps)
            step(*arguments)

    # ---- as `Connections`

    races = 0

    def fits(self, descriptors: int) -> bool:
        return True

    def note_shortage(self, error: OSError) -> None: ...


class FakeSocket:
    def __init__(self, network: Network, address: Address) -> None:
        self.network, self.address, self.code = network, address, 0

    def connect_ex(self, address: Address) -> int:
        self.network.dialled.append(address)
        fate = self.network.fates[address]
        return fate.code if fate.code and fate.after_s == 0 else errno.EINPROGRESS

    def getsockopt(self, *_: int) -> int:
        return self.code

    def getsockname(self) -> Address:
        return "10.0.0.254", 1

    def setsockopt(self, level: int, *_: int) -> None:
        if level != socket.IPPROTO_TCP:  # an address that is not this host's, without CAP_NET_ADMIN
            raise OSError(errno.EPERM, "Operation not permitted")

    def close(self) -> None: ...


class World:
    """A picker over endpoints with given fates, and dials over them."""

    def __init__(self, *fates: Fate, affinity_timeout_s: int | None = None) -> None:
        self.endpoints = [Endpoint(f"10.0.{n // 250}.{n % 250 + 1}", 80) for n in range(len(fates))]
        self.network = Network({e.address: fate for e, fate in zip(self.endpoints, fates, strict=True)})
        self.memory = Memory(self.network.time)
        network: Any = self.network
        context: Any = SimpleNamespace(  # the parts of a `PlaneContext` that dials use
            poller=network, loop=network, connections=network, deadlines=deadlines(network), limits=Limits()
        )
        service_port = ServicePort(NAME, 80, ("10.96.0.1",), affinity_timeout_s=affinity_timeout_s)
        spec = ListenerSpec(service_port, 10_001)
        self.listener = BaseListener(spec, network, context, Shared(self.memory))
        self.picker = self.listener.picker
        self.picker.set_endpoints(self.endpoints)

    def use_clients_addresses(self) -> None:
        """Let dials leave from the client's address, which the kernel refuses."""
        tables: Any = SimpleNamespace(is_local=lambda _: False)
        self.listener.transparent = Transparent(tables, self.listener.counters)

    def attempt(self, client_ip: str = CLIENT) -> Attempt:
        """Dial until an endpoint is connected, or all have failed."""
        attempt = Attempt(self.network.now_s)
        ejected = set(self.memory.ejected)
        before = len(self.network.dialled)
        Dial(client_ip, self.listener, attempt).start()
        self.network.run(lambda: attempt.over)
        if attempt.sock is not None:
            self.network.close(attempt.sock)
        attempt.took_s = self.network.now_s - attempt.took_s
        attempt.dialled = self.network.dialled[before:]
        attempt.trials = len(ejected & set(attempt.dialled))
        assert (self.network.handlers, self.network.races) == ({}, 0), "all else is closed"
        assert not any(counters.dialling for _, counters in self.memory.counters()), "no dial is counted for ever"
        assert self.network.most_open <= 2
        return attempt


@dataclass
class Attempt:
    took_s: float
    pick: Pick | None = None
    over: bool = False
    sock: Any = None
    trials: int = 0
    dialled: list[Address] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def on_connected(self, backend: Any, pick: Pick, events: int) -> None:
        self.over, self.pick, self.sock = True, pick, backend

    def on_failed(self, reason: str) -> None:
        self.over = True
        self.failures.append(reason)


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dials get their sockets from the network of the poller that they are watched by."""
    monkeypatch.setattr(dial_module, "stream_socket", lambda address, _: _Unbound(address))


class _Unbound(FakeSocket):
    """A placeholder: the network is set before the first dial."""

    def __init__(self, address: Address) -> None:
        super().__init__(CURRENT[-1], address)


CURRENT: list[Network] = []


def world(*fates: Fate, affinity_timeout_s: int | None = None) -> World:
    made = World(*fates, affinity_timeout_s=affinity_timeout_s)
    CURRENT[:] = [made.network]
    return made


rejections = st.sampled_from([errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.EACCES, errno.ENETUNREACH])
failing = st.one_of(
    st.just(SILENT),
    st.builds(Fate, st.sampled_from([0, 0.0001, 0.2, 0.4]), rejections),
)
answering = st.builds(Fate, st.sampled_from([0.0001, 0.05, 0.2]))


@settings(max_examples=300, deadline=None)
@given(st.lists(failing, max_size=20), answering, st.data())
def test_no_attempt_fails_while_one_endpoint_answers(fates: list[Fate], living: Fate, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(fates)))
    there = world(*fates[:at], living, *fates[at:])

    for pause_s in data.draw(st.lists(st.sampled_from([0, 0.5, 1, 3, 60]), min_size=3, max_size=8)):
        there.network.now_s += pause_s
        attempt = there.attempt()

        assert attempt.pick is not None
        assert attempt.pick.endpoint == there.endpoints[at]
        assert attempt.trials <= 1
        assert attempt.took_s < BUDGET_S


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.just(Fate(2.2)), rejections.map(lambda code: Fate(0.1, code))), max_size=7))
def test_endpoints_far_away_are_reached_where_there_is_nothing_nearer(fates: list[Fate]) -> None:
    there = world(*fates, Fate(2.2))

    for _ in range(4):
        assert there.attempt().pick is not None


def test_one_far_away_is_reached_among_seven_that_are_silent() -> None:
    for at in range(8):
        there = world(*(Fate(2.2) if n == at else SILENT for n in range(8)))

        assert there.attempt().pick is not None, at


def test_half_of_the_endpoints_vanish_and_no_client_notices_for_long() -> None:
    there = world(*[SILENT] * 4, *[NEAR] * 4)

    waits = []
    for _ in range(60):
        waits.append(there.attempt().took_s)
        there.network.now_s += 0.1

    assert max(waits) < 5 * RACE_S
    assert sum(wait > RACE_S for wait in waits) < 30


def test_the_first_to_answer_wins_and_the_other_one_keeps_its_turns() -> None:
    there = world(Fate(0.3), NEAR)

    for _ in range(OVERTAKEN_MAX - 1):
        attempt = there.attempt()
        assert attempt.pick is not None
        assert (attempt.pick.endpoint, attempt.pick.why) == (there.endpoints[1], "failover")
        assert attempt.took_s == pytest.approx(RACE_S + 0.001)
    assert (there.listener.counters.ejections, there.listener.counters.dial_failures) == (0, 0)
    assert attempt.dialled[0] == there.endpoints[0].address


def test_a_late_first_endpoint_wins_if_it_answers_before_the_second() -> None:
    there = world(Fate(0.3), Fate(0.2))

    attempt = there.attempt()

    assert attempt.pick is not None
    assert (attempt.pick.endpoint, len(attempt.dialled)) == (there.endpoints[0], 2)
    assert not there.memory.ejected


def test_a_pin_stays_while_its_endpoint_is_only_slow_and_moves_when_it_fails() -> None:
    there = world(NEAR, NEAR, affinity_timeout_s=100)
    first = there.endpoints[0]
    there.attempt()

    there.network.fates[first.address] = Fate(0.4)
    attempt = there.attempt()
    assert attempt.pick is not None
    assert (attempt.pick.endpoint, there.memory.pins[CLIENT].address) == (there.endpoints[1], first.address)

    there.network.fates[first.address] = Fate(0.001, errno.ECONNREFUSED)
    there.attempt()
    assert there.memory.pins[CLIENT].address == there.endpoints[1].address


def test_a_pin_stays_where_it_is_when_no_endpoint_answers() -> None:
    there = world(NEAR, NEAR, affinity_timeout_s=100)
    there.attempt()
    for endpoint in there.endpoints:
        there.network.fates[endpoint.address] = SILENT

    attempt = there.attempt()

    assert attempt.pick is None
    assert attempt.took_s <= BUDGET_S + 1.25
    assert there.memory.pins[CLIENT].address == there.endpoints[0].address


@pytest.mark.parametrize("after_s", [0, 0.0001])
def test_the_first_client_finds_the_one_endpoint_that_answers_among_thousands_that_refuse(after_s: float) -> None:
    there = world(*[Fate(after_s, errno.EHOSTUNREACH)] * 2_000, NEAR)

    attempt = there.attempt()

    assert attempt.pick is not None
    assert len(attempt.dialled) == len(set(attempt.dialled)) > DIALS_MAX


def test_thousands_of_endpoints_that_refuse_cost_each_a_dial_and_each_client_no_more_than_its_bound() -> None:
    there = world(*[Fate(0, errno.EHOSTUNREACH)] * 2_000)
    for _ in range(5):
        ejected = len(there.memory.ejected)
        attempt = there.attempt()

        assert attempt.pick is None
        assert len(attempt.dialled) <= len(there.memory.ejected) - ejected + DIALS_MAX


_REFUSED_ADDRESS = "the client's address cannot be used: Operation not permitted"


def test_a_client_whose_address_cannot_be_used_fails_once_and_no_endpoint_is_dialled() -> None:
    there = world(NEAR, NEAR, NEAR)
    there.use_clients_addresses()

    attempt = there.attempt()

    assert (attempt.failures, attempt.dialled) == ([_REFUSED_ADDRESS], [])
    assert there.listener.counters.sources_refused == 1


def test_a_clients_address_that_cannot_be_used_beside_an_open_dial_ends_that_dial_too() -> None:
    there = world(SILENT, NEAR)
    there.use_clients_addresses()
    hairpin = there.endpoints[0]  # is dialled from this node's address

    attempt = there.attempt(client_ip=hairpin.ip)

    assert (attempt.failures, attempt.dialled) == ([_REFUSED_ADDRESS], [hairpin.address])


# ---- cost


def test_one_timer_serves_all_dials_with_the_same_timeout() -> None:
    there = world(SILENT)
    armed: list[float] = []
    loop: Any = SimpleNamespace(time=lambda: 1.0, call_at=lambda at, _: armed.append(at))
    deadline = Deadlines(loop, RACE_S)

    for _ in range(3):
        deadline.add(Dial(CLIENT, there.listener, Attempt(0.0)))

    assert armed == [1.0 + RACE_S]


def test_without_a_descriptor_for_a_second_dial_the_first_one_continues_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    there = world(Fate(0.3), NEAR, NEAR)
    monkeypatch.setattr(there.network, "fits", lambda descriptors: False)

    attempt = there.attempt()

    assert attempt.dialled == [there.endpoints[0].address]
    assert there.listener.counters.retries == 1, "only once after RACE_S"


def test_dials_that_fail_at_once_let_packets_be_handled_in_between() -> None:
    there = world(*[Fate(0, errno.EHOSTUNREACH)] * (3 * _DIALS_A_TURN - 1))
    pauses: list[float] = []
    later = there.network.call_later

    def call_later(after_s: float, step: Callable[..., None], *arguments: object) -> None:
        pauses.append(after_s)
        later(after_s, step, *arguments)

    there.network.call_later = call_later  # type: ignore[method-assign]

    attempt = there.attempt()

    assert len(pauses) == len(attempt.dialled) // _DIALS_A_TURN >= 2


def test_a_dial_without_a_descriptor_is_repeated_and_then_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    there = world(NEAR)
    tries: list[Address] = []

    def no_socket(address: Address, _: str) -> None:
        tries.append(address)
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(dial_module, "stream_socket", no_socket)

    attempt = there.attempt()

    assert attempt.failures == ["out of descriptors"]
    assert len(tries) == 1 + STARVED_MAX


# ---- results


def test_an_endpoint_that_answers_after_its_ejection_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    there = world(Fate(0.001, errno.ECONNREFUSED), NEAR)
    caplog.set_level("INFO", "userspace_proxy")
    there.attempt()
    assert "takes connections again" not in caplog.text

    there.network.fates[there.endpoints[0].address] = NEAR
    there.network.now_s += EJECT_S
    for _ in range(4):
        there.attempt()

    assert caplog.text.count("takes connections again") == 1


def test_a_suspect_that_connects_late_has_the_whole_time_to_prove_itself() -> None:
    there = world(Fate(RACE_S - PROOF_S / 2), NEAR)
    there.listener.suspects.note_reset(there.endpoints[0].address, there.network.now_s)

    assert there.attempt().took_s == pytest.approx(RACE_S + PROOF_S / 2)


def test_of_two_suspects_the_one_that_was_connected_first_has_proved_itself_first() -> None:
    there = world(Fate(RACE_S + PROOF_S), Fate(0.01))
    first, second = there.endpoints
    for endpoint in there.endpoints:
        there.listener.suspects.note_reset(endpoint.address, there.network.now_s)

    attempt = there.attempt()

    assert attempt.dialled == [first.address, second.address]
    assert attempt.pick is not None
    assert attempt.pick.endpoint == second
    assert attempt.took_s == pytest.approx(RACE_S + 0.01 + PROOF_S)


def test_a_suspect_that_proved_itself_and_then_broke_is_followed_by_another_endpoint() -> None:
    """The same dial goes on, and nothing is left of the proof."""
    there = world(NEAR, Fate(RACE_S + 0.1))
    first, second = there.endpoints
    there.listener.suspects.note_reset(first.address, there.network.now_s)
    attempt = Attempt(0.0)
    dial = Dial(CLIENT, there.listener, attempt)
    dial.start()
    there.network.run(lambda: attempt.over)
    assert attempt.pick is not None
    assert attempt.pick.endpoint == first
    there.network.close(attempt.sock)
    attempt.over = False

    dial.resume(attempt.pick, errno.ECONNRESET)
    there.network.run(lambda: attempt.over)

    assert attempt.pick.endpoint == second
