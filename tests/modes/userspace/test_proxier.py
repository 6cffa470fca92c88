"""The userspace proxier when syncs, repairs and refusals of the kernel coincide."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Collection, Mapping, Sequence

import pytest

from tests.modes.redirect_cases import Redirects
from tests.modes.userspace.test_histories import HeldRules
from userspace_proxy.control.proxy_ports import ProxyPorts
from userspace_proxy.dataplane.connections import Limits
from userspace_proxy.dataplane.plane import LocalPlane
from userspace_proxy.errors import SyncError
from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.listeners import NO_ROOM, ListenerSpec
from userspace_proxy.model.names import L4Protocol, ListenerName, NamespacedName, ServicePortName
from userspace_proxy.model.redirects import DROPPED
from userspace_proxy.model.routes import Sender
from userspace_proxy.model.service import Portal, ServicePort
from userspace_proxy.model.state import ProxyState
from userspace_proxy.modes import base_proxier
from userspace_proxy.modes.plans import NodeRules
from userspace_proxy.modes.userspace.proxier import UserspaceProxier
from userspace_proxy.modes.userspace.redirects import RedirectTranslator
from userspace_proxy.netfilter.conntrack import ANY_IP, Answering

ONE, OTHER = Endpoint("10.244.0.1", 8080), Endpoint("10.244.0.2", 8080)


class SlowRules(HeldRules):
    """Rules that it takes time to look at, until ``are_seen``."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0
        self.are_seen = asyncio.Event()

    async def is_intact(self) -> bool:
        self.looks += 1
        await self.are_seen.wait()
        return True


class FullPlane(LocalPlane):
    """A data plane that has no descriptor left for service ports named "unlucky"."""

    async def open(self, specs: Sequence[ListenerSpec]) -> Mapping[ListenerName, str]:
        unlucky = {spec.name: NO_ROOM for spec in specs if spec.service_port.name.service.name == "unlucky"}
        return {**await super().open([spec for spec in specs if spec.name not in unlucky]), **unlucky}


def service_port(name: str, cluster_ip: str, protocol: L4Protocol = L4Protocol.TCP) -> ServicePort:
    return ServicePort(ServicePortName(NamespacedName("default", name), "", protocol), 80, (cluster_ip,))


def state(of: Mapping[ServicePort, Sequence[Endpoint]]) -> ProxyState:
    return ProxyState({each.name: each for each in of}, {each.name: tuple(there) for each, there in of.items()})


@contextlib.asynccontextmanager
async def running(rules: HeldRules, plane: LocalPlane) -> AsyncIterator[UserspaceProxier]:
    try:
        yield UserspaceProxier(plane, rules, ProxyPorts(10_000, 29_999, {}), RedirectTranslator(NodeRules()))
    finally:
        await plane.close(0)


def serving(plane: LocalPlane, of: ServicePort) -> Collection[Endpoint]:
    (found,) = [listener.picker.endpoints for name, listener in plane.listeners.items() if name.service_port == of.name]
    return found.values()


async def test_a_repair_that_tries_to_open_once_more_leaves_what_is_newer_in_force() -> None:
    unlucky, web = service_port("unlucky", "10.96.0.1"), service_port("web", "10.96.0.2")
    rules, plane = SlowRules(), FullPlane(Limits())
    async with running(rules, plane) as proxier, asyncio.timeout(20):
        await proxier.sync(state({unlucky: [ONE], web: [ONE]}))
        assert proxier.unopened
        repair = asyncio.create_task(proxier._repair())
        while not rules.looks:
            await asyncio.sleep(0)
        sync = asyncio.create_task(proxier.sync(state({unlucky: [ONE], web: [OTHER]})))
        await asyncio.sleep(0)

        rules.are_seen.set()
        await asyncio.gather(repair, sync)

        assert [endpoint.address for endpoint in serving(plane, web)] == [OTHER.address]


@pytest.mark.parametrize("is_refused", [False, True])
async def test_flows_of_an_earlier_policy_are_deleted_even_after_a_refused_load(
    monkeypatch: pytest.MonkeyPatch, is_refused: bool
) -> None:
    forgotten: list[Portal] = []

    async def forget(changed: Mapping[Portal, object]) -> Mapping[str, int]:
        forgotten.extend(changed)
        return Counter()

    monkeypatch.setattr(base_proxier, "forget_udp_flows", forget)
    dns, new = service_port("dns", "10.96.0.1", L4Protocol.UDP), service_port("new", "10.96.0.2")
    rules, plane = HeldRules(), LocalPlane(Limits())
    async with running(rules, plane) as proxier:
        await proxier.sync(state({dns: [ONE, OTHER]}))
        proxier._with_old_flows = {dns.name}  # a policy has changed, and its flows were let stay
        forgotten.clear()
        after = state({dns: [ONE], new: [ONE]})
        rules.refuses = is_refused
        with contextlib.suppress(SyncError):
            await proxier.sync(after)
        rules.refuses = False
        await proxier.sync(after)

    assert Portal("10.96.0.1", 80, L4Protocol.UDP) in forgotten


# ---- conntrack entries to forget

WEB = Portal("10.96.0.1", 80, L4Protocol.TCP)
DNS, DNS6 = Portal("10.96.0.10", 53, L4Protocol.UDP), Portal("fd00:96::10", 53, L4Protocol.UDP)
NODE_PORT = Portal("0.0.0.0", 30_053, L4Protocol.UDP)


def by(*ports: int) -> Answering:
    return {(ANY_IP, port) for port in ports}


def changes(old: Redirects, new: Redirects) -> tuple[Mapping[Portal, Answering], Collection[Portal]]:
    """Return the UDP portals with flows to forget when *new* replaces *old*, and the new TCP portals."""
    translator = RedirectTranslator(NodeRules())
    proxier = UserspaceProxier(LocalPlane(Limits()), HeldRules(), ProxyPorts(10_000, 29_999, {}), translator)
    changed = {name: old.translations.get(name) for name in {*old.translations, *new.translations}}
    translator.translations = new.translations
    return proxier._changed_flows(changed), proxier._new_tcp_portals(changed)


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ({}, {}, {}),
        ({DNS: 1}, {DNS: 1}, {}),
        ({}, {DNS: 1}, {DNS: by(1)}),
        ({DNS: 1}, {DNS: 2}, {DNS: by(2)}),
        ({DNS: 1}, {}, {DNS: set()}),
        ({DNS: 1}, {DNS: DROPPED}, {DNS: by(DROPPED)}),
        ({WEB: 1}, {WEB: 2}, {}),
        ({WEB: 1}, {}, {}),
        ({DNS: 1, NODE_PORT: 2}, {DNS: 1, NODE_PORT: 3, DNS6: 1}, {NODE_PORT: by(3), DNS6: by(1)}),
    ],
)
async def test_only_udp_portals_that_lead_elsewhere_have_flows_to_forget(
    old: Mapping[Portal, int], new: Mapping[Portal, int], changed: Mapping[Portal, Answering]
) -> None:
    assert changes(Redirects(old), Redirects(new))[0] == changed


async def test_a_portal_leads_wherever_some_sender_is_led() -> None:
    old = Redirects({DNS: 1, NODE_PORT: 1})
    new = Redirects({DNS: 1, NODE_PORT: 1}, exceptions={Sender.POD: {DNS: 2}, Sender.NODE: {DNS: 3, WEB: 4}})

    assert changes(old, new)[0] == {DNS: by(1, 2, 3)}
    assert changes(new, old)[0] == {DNS: by(1)}


async def test_tcp_portals_are_new_once() -> None:
    old, new = Redirects({WEB: 1, DNS: 1}), Redirects({WEB: 2, DNS: 1})

    assert changes(Redirects(), new)[1] == {WEB}
    assert changes(old, new)[1] == set()
    assert changes(Redirects(), Redirects({}, exceptions={Sender.NODE: {WEB: DROPPED}}))[1] == {WEB}
