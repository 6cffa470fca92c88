"""Userspace mode: listeners for each service port, and rules that redirect its portals to them.

Always in this order: open, load, retire. So no rule ever points at a port without a listener, and a refused load leaves
the old rules and the old listeners serving.
"""

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import replace
from itertools import product, starmap

from prometheus_client.core import Metric

from userspace_proxy.control.proxy_ports import ProxyPorts
from userspace_proxy.errors import SyncError
from userspace_proxy.host.capture import has_unnumbered_interfaces
from userspace_proxy.host.network import add_local_addresses
from userspace_proxy.interfaces import DataPlane
from userspace_proxy.model.listeners import NO_ROOM, Backends, ListenerSpec
from userspace_proxy.model.names import L4Protocol, ListenerName, Scope, ServicePortName
from userspace_proxy.model.redirects import Capture
from userspace_proxy.model.routes import Refusal, Sender
from userspace_proxy.model.service import Portal, ServicePort, portals
from userspace_proxy.model.state import ProxyState
from userspace_proxy.modes.base_proxier import BaseProxier
from userspace_proxy.modes.kernel_rules import LoadableRules, RuleUpdate, Translation
from userspace_proxy.modes.plans import Plan
from userspace_proxy.modes.userspace.redirects import RedirectTranslator
from userspace_proxy.netfilter.conntrack import ANY_IP, Answering
from userspace_proxy.netfilter.notices import NetworkNotices

_PORT_TRIES = 64
# The pause between attempts to open listeners for which there was no port, descriptor or memory.
_OPEN_AGAIN_S = 3.0
# The pause after a change of interfaces: more changes follow.
_SETTLE_S = 0.2

log = logging.getLogger(__name__)


class UserspaceProxier(BaseProxier):
    """Applies each state to listeners and rules."""

    def __init__(
        self,
        plane: DataPlane,
        kernel: LoadableRules,
        ports: ProxyPorts,
        translator: RedirectTranslator,
        *,
        watches_interfaces: bool = False,
    ) -> None:
        """*watches_interfaces*: switch to another kind of capture when REDIRECT cannot work at an interface."""
        super().__init__(kernel, translator)
        self._redirects = translator
        self._opened = translator.opened
        self._plane = plane
        self._ports = ports
        self._watches_interfaces = watches_interfaces
        self._given: dict[ListenerName, Backends] = {}
        self._with_old_flows: set[ServicePortName] = set()  # their UDP flows may follow an earlier traffic policy
        self._losing: set[ServicePortName] = set()  # UDP service ports that lost an endpoint since the last sync
        self._adopted: set[ServicePortName] = set()  # with listeners that the first state may not have

    def adopt(self, specs: Iterable[ListenerSpec]) -> None:
        """Take over listeners that the data plane has from the previous process. Call it before the first sync."""
        for spec in specs:
            self._redirects.open(spec)
            self._ports.hold(spec.name, spec.proxy_port)
            self._adopted.add(spec.name.service_port)

    # ---- sync

    async def sync(self, state: ProxyState) -> None:
        async with self._lock:
            await self._sync(state)

    async def _sync(self, state: ProxyState) -> None:
        self._redirects.plan(state)
        changed = self._plans.unfinished
        await self._open(changed)
        self._redirects.translate()
        self._losing |= self._losing_endpoints(changed)
        emptied = await self._give_usable(changed)
        gone = [name for name in self._candidates(changed) if name in self._opened and not self._is_planned(name)]
        await self._load()
        await self._give(emptied)  # the rules send no more clients to these
        await self._retire(gone)
        if with_old_flows := self._losing & self._with_old_flows:
            await self._forget_old_flows(with_old_flows)
        self._losing.clear()
        self._adopted.clear()
        self._plans.finish()

    def _candidates(self, changed: Iterable[Plan]) -> Iterable[ListenerName]:
        """Return the listeners that may have lost their plans."""
        if self._adopted:
            return list(self._opened)
        names = (*self._plans.gone, *(plan.service_port.name for plan in changed))
        return starmap(ListenerName, product(names, Scope, (False, True)))

    def _is_planned(self, name: ListenerName) -> bool:
        planned = self._plans.held.get(name.service_port)
        return planned is not None and name in planned.listeners

    def _log_new(self, names: Iterable[ServicePortName]) -> None:
        super()._log_new(name for name in names if name not in self._adopted)

    def _served_by(self, made: Translation) -> Iterator[str]:
        plan = self._plans.held[made.service_port.name]
        addresses = ", ".join(dict.fromkeys(map(str, portals(plan.service_port))))
        for name, backends in plan.listeners.items():
            if (spec := self._opened.get(name)) is not None:
                to = f"proxy port {spec.proxy_port} -> {len(backends.usable)} endpoints"
                yield f"{name}: {name.protocol} {addresses} -> {to}"

    async def _open(self, changed: Iterable[Plan]) -> None:
        """Open or configure the listeners of *changed*, and retry those that could not be opened."""
        if not self._redirects.refuse_port:
            await self._reserve_refuse_port()
        planned = {name: plan.service_port for plan in changed for name in plan.listeners}
        planned |= {n: self._plans.held[n.service_port].service_port for n in self.unopened if self._is_planned(n)}
        specs = [spec for name, service_port in planned.items() if (spec := self._spec(name, service_port))]
        tried: dict[ListenerName, set[int]] = {}
        while specs:
            refused = await self._plane.open(specs)
            for spec in specs:
                if spec.name not in refused:
                    self._redirects.open(spec)
                    self.unopened.pop(spec.name, None)
            specs = [
                replace(spec, proxy_port=port)
                for spec in specs
                if spec.name in refused
                and (port := self._another_port(spec, refused[spec.name], tried.setdefault(spec.name, set())))
            ]

    def _spec(self, name: ListenerName, service_port: ServicePort) -> ListenerSpec | None:
        """Return the listener to open or configure; None if it is open as it should be, or there is no port for it."""
        held = self._opened.get(name)
        if held is not None and held.service_port == service_port:
            return None
        port = held.proxy_port if held else self._ports.next_for(name, set())
        if port is None:
            self._note_unopened(name, "no proxy port is left; widen --proxy-port-range")
            return None
        return ListenerSpec(service_port, port, name.scope, name.transparent)

    def _another_port(self, spec: ListenerSpec, why: str, tried: set[int]) -> int | None:
        """Return the next port to try for a listener that was refused, or None to give up until the next sync."""
        tried.add(spec.proxy_port)
        self._ports.release(spec.name)
        hopeless = len(tried) >= _PORT_TRIES or why.startswith(NO_ROOM)
        port = None if hopeless else self._ports.next_for(spec.name, tried)
        if port is None:
            self._note_unopened(spec.name, why)
        return port

    def _note_unopened(self, name: ListenerName, why: str) -> None:
        if self.unopened.get(name) != why:
            log.error("service port %s has no listener: %s", name, why)
        self.unopened[name] = why

    async def _reserve_refuse_port(self) -> None:
        refused: set[int] = set()
        why = "all are taken"
        while len(refused) < _PORT_TRIES:
            port = self._ports.next_refusing(refused)
            if port is None:
                break
            why = await self._plane.reserve(port)
            if not why:
                self._redirects.refuse_port = port
                return
            refused.add(port)
        raise SyncError(f"no port of --proxy-port-range can be held ({why}); choose another range")

    async def _give_usable(self, changed: Iterable[Plan]) -> dict[ListenerName, Backends]:
        """Give the data plane the endpoints of *changed*; return those to give once the rules are loaded.

        A listener without endpoints keeps its old ones until the rules refuse its clients: otherwise it would accept
        clients only to reset them.
        """
        given: dict[ListenerName, Backends] = {}
        emptied: dict[ListenerName, Backends] = {}
        for planned in changed:
            for name, backends in planned.listeners.items():
                if self._given.get(name) != backends:
                    (given if backends.usable else emptied)[name] = backends
        await self._give(given)
        return emptied

    async def _give(self, backends: Mapping[ListenerName, Backends]) -> None:
        if backends:
            await self._plane.update(backends)
            self._given.update(backends)

    def proxy_port(self, listener: ListenerName) -> int:
        return spec.proxy_port if (spec := self._opened.get(listener)) is not None else 0

    def _answers(self, made: Translation) -> Mapping[Portal, Answering]:
        found: dict[Portal, Answering] = {}
        for (portal, *_), port in zip(made.routes, made.ports, strict=True):
            found[portal] = found.get(portal, frozenset()) | {(ANY_IP, port)}
        return found

    def _changed_flows(self, changed: Mapping[ServicePortName, Translation | None]) -> dict[Portal, Answering]:
        stale = super()._changed_flows(changed)
        for portal in stale:
            name = self._redirects.owners.owner(portal)
            if name is not None and name not in self._losing:
                stale[portal] |= self._kept_flows(name, portal)
        return stale

    def _kept_flows(self, name: ServicePortName, portal: Portal) -> Answering:
        """Return where old flows to *portal* may continue, though the traffic policy sends new ones elsewhere.

        Or drops them, if this node has no endpoint: the endpoints of the old flows still serve.
        """
        routes = self._redirects.translations[name].routes
        if not any(r.portal == portal and r.sender is Sender.ANYBODY and r.to is not Refusal.REJECT for r in routes):
            return frozenset()
        self._with_old_flows.add(name)
        opened = (self._opened.get(listener) for listener in self._plans.held[name].listeners)
        return {(ANY_IP, spec.proxy_port) for spec in opened if spec is not None}

    def _losing_endpoints(self, changed: Iterable[Plan]) -> set[ServicePortName]:
        """Return the UDP service ports of *changed* that lost an endpoint."""
        return {
            name.service_port
            for planned in changed
            for name, backends in planned.listeners.items()
            if name.protocol is L4Protocol.UDP
            and (held := self._given.get(name)) is not None
            and not {e.address for e in held.serving} <= {e.address for e in backends.serving}
        }

    async def _forget_old_flows(self, names: Set[ServicePortName]) -> None:
        """Delete the flows of *names* that follow an earlier traffic policy: an endpoint that they may use is gone."""
        held = (made for name in names if (made := self._redirects.translations.get(name)) is not None)
        await self._forget({portal: ports for made in held for portal, ports in self._answers(made).items()})
        self._with_old_flows -= names

    async def _retire(self, gone: list[ListenerName]) -> None:
        for name in [name for name in self.unopened if not self._is_planned(name)]:
            del self.unopened[name]
        if not gone:
            return
        await self._plane.retire(gone)
        for name in gone:
            del self._opened[name]
            self._given.pop(name, None)
            self._ports.release(name)

    # ---- changes without a new state

    async def _watch_interfaces(self) -> None:
        """Capture by a private address as soon as an interface without an IPv4 address comes up; then return."""
        changed = asyncio.Event()
        notices = NetworkNotices(changed.set)
        try:
            while self._redirects.rules.capture is Capture.REDIRECT:
                await changed.wait()
                await asyncio.sleep(_SETTLE_S)
                changed.clear()
                if await has_unnumbered_interfaces():
                    await add_local_addresses()
                    await self._capture_by_address()
        finally:
            notices.close()

    async def _capture_by_address(self) -> None:
        async with self._lock:
            before = self._redirects.rules
            self._redirects.rules = replace(before, capture=Capture.ADDRESS)
            try:
                if self._loaded is not None:
                    await self._load()
            except SyncError as error:
                self._redirects.rules = before
                log.error("capture could not be changed: %s", error)  # noqa: TRY400
                await asyncio.sleep(_SETTLE_S)

    def metrics(self) -> Iterable[Metric]:
        return ()

    async def run(self) -> None:
        """Repair our rules, and open listeners that could not be opened before. Runs until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(super().run(), name="repair")
            group.create_task(self._keep_opening(), name="open again")
            if self._watches_interfaces:
                group.create_task(self._watch_interfaces(), name="watch interfaces")

    async def _keep_opening(self) -> None:
        """Retry listeners that could not be opened: there may be room now."""
        while True:
            await asyncio.sleep(_OPEN_AGAIN_S)
            with contextlib.suppress(SyncError):  # the controller retries the rest of the sync
                await self._open_again()

    async def _open_again(self) -> None:
        if self.unopened:
            async with self._lock:
                await self._sync(self._plans.state)

    async def _repair(self) -> None:
        await super()._repair()
        await self._open_again()

    async def close(self, drain_timeout_s: float) -> None:
        async with self._lock:
            await self._remove_redirects()
            await self._plane.close(drain_timeout_s)
            await self._remove_rules()

    async def _remove_redirects(self) -> None:
        """Remove the redirects, but not the chains that hold them.

        Without any NAT chain the kernel stops translating open connections too, which have to drain.
        """
        if self._loaded is None:
            return
        names = {*self._redirects.translations, *self._redirects.unloaded}
        try:
            await self._kernel.load(RuleUpdate({}, names, replace(self._loaded, refuse_port=0)))
        except SyncError as error:
            log.error("redirects could not be removed: %s", error)  # noqa: TRY400
            return
        await self._forget(dict.fromkeys(self._udp_portals(), frozenset()))
