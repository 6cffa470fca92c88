"""Desired state without unhealthy endpoints: which endpoints are probed, which remain, and the reported warnings."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import replace

import pytest

from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.names import L4Protocol, NamespacedName, ServicePortName
from userspace_proxy.model.probe import EndpointCondition, ProbeKind, ProbeSpec
from userspace_proxy.model.service import ServicePort
from userspace_proxy.model.state import ProxyState
from userspace_proxy.model.topology import Node
from userspace_proxy.probes import filter as module
from userspace_proxy.probes.filter import HealthFilter

SPEC = ProbeSpec(ProbeKind.TCP, interval_s=0.1, timeout_s=0.1, rise=1, fall=1)
_BOUND_S = 20.0


def service_port(name: str = "web", spec: ProbeSpec | None = SPEC, **fields: bool) -> ServicePort:
    full = ServicePortName(NamespacedName("default", name), "", L4Protocol.TCP)
    return ServicePort(full, 80, ("10.96.0.1",), probe=spec, **fields)  # type: ignore[arg-type]


def state_of(*ports: tuple[ServicePort, Iterable[Endpoint]], node: str = "") -> ProxyState:
    return ProxyState(
        {port.name: port for port, _ in ports}, {port.name: tuple(known) for port, known in ports}, Node(node)
    )


class Servers:
    """Listening sockets at 127.0.0.1 and ::1, by endpoint."""

    def __init__(self) -> None:
        self._open: dict[Endpoint, socket.socket] = {}

    def endpoint(self, *, listening: bool = True, ip: str = "127.0.0.1", **conditions: object) -> Endpoint:
        sock = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET)
        sock.bind((ip, 0))
        endpoint = Endpoint(ip, sock.getsockname()[1], **conditions)  # type: ignore[arg-type]
        self._open[endpoint] = sock
        if listening:
            sock.listen()
        return endpoint

    def listen(self, endpoint: Endpoint) -> None:
        self._open[endpoint].listen()

    def close(self) -> None:
        for sock in self._open.values():
            sock.close()


class Rig:
    def __init__(self) -> None:
        self.servers = Servers()
        self._changed = asyncio.Event()
        self.warnings: list[tuple[NamespacedName, str, str]] = []
        self.filter = HealthFilter(self._changed.set, lambda *said: self.warnings.append(said))

    async def until(self, state: ProxyState, wanted: Callable[[ProxyState], bool]) -> ProxyState:
        """Apply *state* again at each change of a verdict, as the controller does, until the result is *wanted*."""
        async with asyncio.timeout(_BOUND_S):
            while not wanted(left := self.filter.apply(state)):
                await self._changed.wait()
                self._changed.clear()
        return left

    async def left(
        self, port: ServicePort, given: Iterable[Endpoint], expected: Iterable[Endpoint], node: str = ""
    ) -> None:
        """Wait until *expected* remains of *given*."""
        await self.until(state_of((port, given), node=node), lambda s: s.endpoints[port.name] == tuple(expected))


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig()
    yield made
    made.filter.close()
    made.servers.close()


async def test_an_endpoint_whose_probes_fail_leaves_and_comes_back(rig: Rig) -> None:
    up, down = rig.servers.endpoint(), rig.servers.endpoint(listening=False)
    port = service_port()
    await rig.left(port, [up, down], [up])
    health = rig.filter.health(port.name)
    assert health[up.address].condition is EndpointCondition.HEALTHY
    assert health[down.address].condition is EndpointCondition.UNHEALTHY
    assert health[down.address].reason == "tcp: connection refused"
    assert health[down.address].since > 0

    rig.servers.listen(down)
    await rig.left(port, [up, down], [up, down])
    assert rig.filter.health(port.name)[down.address].condition is EndpointCondition.HEALTHY
    assert rig.warnings == []


async def test_what_no_verdict_changes_stays_the_same_object(rig: Rig) -> None:
    up, down = rig.servers.endpoint(), rig.servers.endpoint(listening=False)
    probed, healthy, other = service_port(), service_port("healthy"), service_port("other", None)
    state = state_of((probed, [up, down]), (healthy, [up]), (other, [down]))
    left = await rig.until(state, lambda s: s.endpoints[probed.name] == (up,))

    assert left.endpoints[healthy.name] is state.endpoints[healthy.name]
    assert left.endpoints[other.name] is state.endpoints[other.name]
    assert rig.filter.apply(state).endpoints[probed.name] is left.endpoints[probed.name]
    without_checks = state_of((other, [down]))
    assert rig.filter.apply(without_checks) is without_checks


@pytest.mark.parametrize("panic", [True, False])
async def test_if_all_are_unhealthy_all_are_used_unless_panic_is_off(rig: Rig, panic: bool) -> None:
    given = [rig.servers.endpoint(listening=False) for _ in range(2)]
    port = service_port(spec=replace(SPEC, panic=panic))
    state = state_of((port, given))
    await rig.until(state, lambda _: bool(rig.warnings))

    assert rig.filter.apply(state).endpoints[port.name] == (tuple(given) if panic else ())
    effect = "all are used" if panic else "none is used, by panic=off"
    note = f"every IPv4 endpoint of default/web is unhealthy; {effect}"
    assert rig.warnings == [(port.name.service, "EndpointsUnhealthy", note)]

    rig.servers.listen(given[0])
    await rig.left(port, given, given[:1])


async def test_each_ip_family_panics_by_itself(rig: Rig) -> None:
    up, down = rig.servers.endpoint(), rig.servers.endpoint(listening=False)
    only = rig.servers.endpoint(listening=False, ip="::1")
    port = service_port()
    await rig.until(state_of((port, [up, down, only])), lambda s: s.endpoints[port.name] == (up, only))
    await rig.until(state_of((port, [up, down, only])), lambda _: bool(rig.warnings))

    await rig.left(port, [up, down, only], [up, only])


async def test_an_endpoint_and_a_check_of_two_services_are_probed_once(rig: Rig) -> None:
    down, other = rig.servers.endpoint(listening=False), rig.servers.endpoint()
    one, two = service_port("one"), service_port("two", replace(SPEC, panic=False))
    state = state_of((one, [down, other]), (two, [down]))
    left = await rig.until(state, lambda s: s.endpoints[one.name] == (other,))

    assert left.endpoints[two.name] == ()
    assert probed(rig) == 2

    rig.filter.apply(state_of((two, [down])))
    assert probed(rig) == 1
    rig.filter.apply(state_of())
    assert probed(rig) == 0


async def test_what_can_take_no_traffic_from_this_node_is_not_probed(rig: Rig) -> None:
    up = rig.servers.endpoint
    given = [up(ready=False), up(ready=False, serving=False), up(ready=False, terminating=True), up()]
    rig.filter.apply(state_of((service_port(), given)))
    assert probed(rig) == 2

    local = service_port(internal_local=True)
    here, there = up(node_name="here"), up(node_name="there")
    rig.filter.apply(state_of((local, [here, there]), node="here"))
    assert list(rig.filter.health(local.name)) == [here.address]
    outside = replace(local, node_port=30_080)
    rig.filter.apply(state_of((outside, [here, there]), node="here"))
    assert list(rig.filter.health(local.name)) == [here.address, there.address]


async def test_a_terminating_endpoint_serves_if_every_ready_one_is_unhealthy(rig: Rig) -> None:
    down = rig.servers.endpoint(listening=False)
    leaving = rig.servers.endpoint(ready=False, terminating=True)

    await rig.left(service_port(), [down, leaving], [leaving])


async def test_a_check_at_a_port_of_its_own_is_for_every_port_of_the_pod(rig: Rig) -> None:
    health = rig.servers.endpoint(listening=False)
    up = rig.servers.endpoint()
    ports = [Endpoint("127.0.0.1", 1), Endpoint("127.0.0.1", 2)]
    checked = [service_port(name, replace(SPEC, port=health.port, panic=False)) for name in ("one", "two")]
    state = state_of(*zip(checked, ([endpoint] for endpoint in ports), strict=True))
    await rig.until(state, lambda s: not any(s.endpoints.values()))
    assert probed(rig) == 1

    moved = [replace(port, probe=replace(SPEC, port=up.port, panic=False)) for port in checked]
    left = rig.filter.apply(state_of(*zip(moved, ([endpoint] for endpoint in ports), strict=True)))
    assert [left.endpoints[port.name] for port in moved] == [(ports[0],), (ports[1],)]


async def test_a_change_of_endpoints_keeps_the_verdicts_on_the_others(rig: Rig) -> None:
    up, down, new = rig.servers.endpoint(), rig.servers.endpoint(listening=False), rig.servers.endpoint()
    port = service_port()
    await rig.left(port, [up, down], [up])

    assert rig.filter.apply(state_of((port, [down, up, new]))).endpoints[port.name] == (up, new)


async def test_endpoints_above_the_limit_are_not_probed_and_count_as_healthy(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TARGETS_MAX", 1)
    given = [rig.servers.endpoint(), rig.servers.endpoint(listening=False)]
    port = service_port()
    state = state_of((port, given))

    assert rig.filter.apply(state).endpoints[port.name] == tuple(given)
    assert probed(rig) == 1


async def test_metrics_count_probes_and_unhealthy_endpoints(rig: Rig) -> None:
    up, down = rig.servers.endpoint(), rig.servers.endpoint(listening=False)
    port = service_port()
    await rig.left(port, [up, down], [up])

    samples = {s.name: s for family in rig.filter.metrics() for s in family.samples if s.labels.get("result") != "x"}
    assert samples["userspace_proxy_unhealthy_endpoints"].value == 1
    assert samples["userspace_proxy_unhealthy_endpoints"].labels["service"] == "web"
    assert samples["userspace_proxy_probed_endpoints"].value == 2
    counted = {s.labels["result"]: s.value for f in rig.filter.metrics() for s in f.samples if "result" in s.labels}
    assert set(counted) == {"success", "failure", "timeout", "skipped"}
    assert counted["failure"] >= 1


def probed(rig: Rig) -> int:
    """Return how many endpoints are probed."""
    (family,) = (f for f in rig.filter.metrics() if f.name == "userspace_proxy_probed_endpoints")
    return int(family.samples[0].value)
