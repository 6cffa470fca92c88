"""Any history of Services, slices and the node ends where a fresh start on the final objects begins.

The sockets are real; the kernel is a fake that can refuse, because rules that differ from each other are compared in
tests/modes, text by text and in a real kernel. No packet is sent. So conntrack's tables are empty, and are not read:
one look at them walks all buckets of the kernel's hash table, which costs more CPU than the rest of a history.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.control.given import put
from tests.simulation.install import EmptyTables
from userspace_proxy import api
from userspace_proxy.api.events import EventType, ObjectEvent
from userspace_proxy.control.allocations import Allocations
from userspace_proxy.control.proxy_ports import ProxyPorts
from userspace_proxy.control.tracker import Tracker
from userspace_proxy.dataplane import plane
from userspace_proxy.dataplane.connections import Limits
from userspace_proxy.dataplane.plane import LocalPlane
from userspace_proxy.errors import SyncError
from userspace_proxy.model.endpoint import Address
from userspace_proxy.model.names import ListenerName, NamespacedName, ServicePortName
from userspace_proxy.model.redirects import Capture, PodDetector
from userspace_proxy.model.topology import Node
from userspace_proxy.modes.kernel_rules import NodeFacts, RuleUpdate, Translation
from userspace_proxy.modes.plans import NodeRules
from userspace_proxy.modes.userspace.proxier import UserspaceProxier
from userspace_proxy.modes.userspace.redirects import RedirectTranslator
from userspace_proxy.netfilter import conntrack

_SERVICES = ("web", "dns")
_RULES = NodeRules(pods=PodDetector(cidrs=("10.0.0.0/8",)))


class HeldRules:
    """A kernel that holds the loaded rules, or refuses them."""

    def __init__(self) -> None:
        self.held: dict[ServicePortName, Translation] = {}
        self.facts = NodeFacts()
        self.refuses = False

    async def load(self, update: RuleUpdate) -> None:
        if self.refuses:
            raise SyncError("refused")
        for name in update.changed:
            self.held.pop(name, None)
            if name in update.translations:
                self.held[name] = update.translations[name]
        self.facts = update.facts

    async def reload(self) -> None: ...

    async def remove(self) -> None:
        self.held = {}

    async def is_intact(self) -> bool:
        return True

    async def watch(self, on_change: Callable[[], None]) -> None: ...

    def unwatch(self) -> None: ...


# ---- objects, as the API has them


# Each object is made from one drawn number: to draw every field of its own took two thirds of the CPU of these tests.
_NUMBERS = st.integers(0, 1 << 20).map(random.Random)


def service(choices: random.Random) -> api.KubernetesObject:
    pick = choices.choice
    name = pick(_SERVICES)
    number = _SERVICES.index(name) + 1
    kind = pick(["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"])
    names = choices.sample(["a", "b"], pick([1, 2]))
    ports = choices.sample([*itertools.product(["TCP", "UDP", "SCTP"], [53, 80])], len(names))
    both = [f"10.96.0.{number}", f"fd00:96::{number}"]
    spec: dict[str, Any] = {
        "type": kind,
        "clusterIPs": pick([both[:1], both[1:], both, ["None"]]),
        "ports": [
            {
                "name": port_name,
                "protocol": protocol,
                "port": port,
                "nodePort": 30_000 + 100 * number + index if kind in ("NodePort", "LoadBalancer") else None,
            }
            for index, (port_name, (protocol, port)) in enumerate(zip(names, ports, strict=True))
        ],
        "externalIPs": pick([None, [f"198.51.100.{number}"]]),
        "internalTrafficPolicy": pick([None, "Cluster", "Local"]),
        "externalTrafficPolicy": pick([None, "Cluster", "Local"]),
        "sessionAffinity": pick(["None", "ClientIP"]),
        "loadBalancerSourceRanges": pick([None, ["192.0.2.0/24"]]),
    }
    annotations = pick([None, {"userspace-proxy/source-ip": "transparent"}])
    ingress = [{"ip": f"203.0.113.{number}", "ipMode": pick([None, "VIP", "Proxy"])}]
    status = {"loadBalancer": {"ingress": ingress if kind == "LoadBalancer" else []}}
    return api.convert(
        "Service", {"metadata": {"name": name, "annotations": annotations}, "spec": spec, "status": status}
    )


def endpoint_slice(choices: random.Random) -> api.KubernetesObject:
    pick = choices.choice
    of, number, address_type = pick(_SERVICES), pick([1, 2]), pick(["IPv4", "IPv6"])
    condition = [None, True, False]
    endpoints = [
        {
            "addresses": [f"10.1.0.{host}" if address_type == "IPv4" else f"fd00:1::{host}"],
            "conditions": {"ready": pick(condition), "serving": pick(condition), "terminating": pick(condition)},
            "nodeName": pick(["here", "there", None]),
            "hints": pick([None, {"forZones": [{"name": "a"}]}, {"forNodes": [{"name": "here"}]}]),
        }
        for host in choices.sample(range(1, 5), choices.randint(0, 4))
    ]
    plain = {
        "metadata": {"name": f"{of}-{address_type}-{number}", "labels": {"kubernetes.io/service-name": of}},
        "addressType": address_type,
        "endpoints": endpoints,
        "ports": [{"name": n, "port": 8080, "protocol": p} for n in ("a", "b") for p in ("TCP", "UDP")],
    }
    return api.convert("EndpointSlice", plain)


def node(choices: random.Random) -> api.KubernetesObject:
    zone = choices.choice([None, {"topology.kubernetes.io/zone": "a"}, {"topology.kubernetes.io/zone": "b"}])
    status = {"addresses": [{"type": "InternalIP", "address": choices.choice(["192.0.2.1", "192.0.3.1"])}]}
    return api.convert("Node", {"metadata": {"name": "here", "labels": zone}, "status": status})


Step = tuple[str, Any]


@st.composite
def histories(draw: st.DrawFn) -> list[Step]:
    kinds = st.sampled_from([service, endpoint_slice, endpoint_slice, node])
    written = st.builds(lambda make, choices: ("put", make(choices)), kinds, _NUMBERS)
    steps = st.one_of(
        written,
        written,
        delete := st.tuples(st.just("delete"), st.integers(0, 9)),
        st.tuples(st.sampled_from(["sync", "sync", "refused sync"]), st.none()),
    )
    # What was refused last is what most may be left of.
    last = [("sync", None), draw(st.one_of(written, delete)), ("refused sync", None)]
    return [*draw(st.lists(steps, min_size=5, max_size=40)), *last]


# ---- what is compared


@dataclass
class Held:
    """The results of a proxier: every rule with its listener, and every picker with its addresses."""

    rules: object
    pickers: Mapping[ListenerName, frozenset[Address]]


@dataclass
class Run:
    """One proxier during a history."""

    proxier: UserspaceProxier
    plane: LocalPlane
    kernel: HeldRules
    tracker: Tracker
    objects: dict[tuple[str, NamespacedName], api.KubernetesObject] = field(default_factory=dict)

    def apply(self, *events: ObjectEvent) -> None:
        for event in events:
            assert event.name is not None
            if event.object is not None:
                self.objects[event.kind, event.name] = event.object
            else:
                self.objects.pop((event.kind, event.name))
        self.tracker.apply(events)

    async def sync(self) -> None:
        with contextlib.suppress(SyncError):
            await self.proxier.sync(self.tracker.state())

    def held(self) -> Held:
        listeners = {listener.spec.proxy_port: listener for listener in self.plane.listeners.values()}
        by_port: dict[int, object] = {port: listener.name for port, listener in listeners.items()}
        by_port |= {0: "dropped", self.kernel.facts.refuse_port: "refused"}
        rules = {
            name: (
                {(r.portal, r.sender): by_port[port] for r, port in zip(made.routes, made.ports, strict=True)},
                dict(made.allowed),
            )
            for name, made in self.kernel.held.items()
            if made.routes
        }
        facts = self.kernel.facts
        return Held(
            rules=(rules, facts.node_ports_on, facts.capture is Capture.REDIRECT),
            pickers={listener.name: frozenset(listener.picker.endpoints) for listener in listeners.values()},
        )


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[Run]:
    local_plane, kernel = LocalPlane(Limits()), HeldRules()
    proxier = UserspaceProxier(local_plane, kernel, ProxyPorts(10_000, 29_999, {}), RedirectTranslator(_RULES))
    try:
        yield Run(proxier, local_plane, kernel, Tracker(Allocations(), here=Node("here")))
    finally:
        await local_plane.close(0)


async def live_through(run: Run, history: list[Step]) -> None:
    for step, what in history:
        match step:
            case "put":
                run.apply(put(what))
            case "delete" if deletable := [key for key in run.objects if key[0] != "Node"]:  # a Node stays (Z2)
                kind, name = deletable[what % len(deletable)]
                run.apply(ObjectEvent(EventType.DELETE, kind, name))
            case "sync":
                await run.sync()
            case "refused sync":
                run.kernel.refuses = True
                await run.sync()
                run.kernel.refuses = False
    await run.sync()


@pytest.fixture(scope="module", params=[uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"])
def runner(request: pytest.FixtureRequest) -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=request.param) as runner, pytest.MonkeyPatch.context() as patch:
        patch.setattr(conntrack, "read_entries", lambda *_: ())
        patch.setattr(plane, "KernelTables", EmptyTables)
        yield runner


@settings(max_examples=500)
@given(history=histories())
def test_any_history_ends_where_a_fresh_start_begins(runner: asyncio.Runner, history: list[Step]) -> None:
    async def check() -> None:
        async with running() as run:
            await live_through(run, history)
            left = run.held()
            objects = dict(run.objects)
        async with running() as fresh:
            fresh.apply(*(put(thing) for thing in objects.values()))
            await fresh.sync()
            assert left == fresh.held()
            assert not run.proxier.unopened

    runner.run(check())
