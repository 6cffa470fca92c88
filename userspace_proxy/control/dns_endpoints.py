"""A Source that adds endpoints to Services whose annotation is a DNS name, which is resolved once a second.

Fail static: while no server answers, the last addresses stay. An answer that the name has no addresses takes
effect only after a few such answers in a row. A name is also unknown while its only container restarts.
"""

import asyncio
import contextlib
import logging
import struct
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from userspace_proxy import api
from userspace_proxy.api.events import EventType, ObjectEvent
from userspace_proxy.api.objects import EndpointPort, ObjectMeta, SliceEndpoint
from userspace_proxy.control import decode
from userspace_proxy.dns import messages
from userspace_proxy.dns.upstream import SERVERS_MAX, exchange, read_servers
from userspace_proxy.interfaces import Source
from userspace_proxy.model.names import NamespacedName
from userspace_proxy.model.watch_stats import WatchStats
from userspace_proxy.sources.merged import merged

_EVERY_S = 1.0
_TIMEOUT_S = 1.0  # of all servers together
_SERVICES_MAX = 100
_ADDRESSES_MAX = 1_000  # as in an EndpointSlice
_DENIALS = 5
_TYPES = {"IPv4": messages.A, "IPv6": messages.AAAA}
# No Pod is known, so a target port by name stands for the port of the Service.
_NO_POD = api.Pod(ObjectMeta())

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Answer:
    """What is known of a name in one family. ``error``: "" if the last answer had addresses.

    ``is_known``: it has had addresses, or enough answers in a row that it has none.
    """

    addresses: tuple[str, ...] = ()
    denials: int = 0
    is_known: bool = False
    error: str = ""


class DnsEndpoints:
    """Passes on the events of *source*, with EndpointSlices from DNS answers; SYNCED waits for the first answers."""

    def __init__(self, source: Source, resolv_conf: Path = Path("/etc/resolv.conf")) -> None:
        self._source = source
        self._resolv_conf = resolv_conf
        self._services: dict[NamespacedName, tuple[api.Service, decode.DnsTarget]] = {}
        self._answers: dict[tuple[str, str], _Answer] = {}  # by name and family
        self._slices: dict[NamespacedName, api.EndpointSlice] = {}  # as the tracker has them
        self._problems: dict[str, str] = {}
        self._is_synced = False
        self._has_names = asyncio.Event()

    @property
    def problems(self) -> Mapping[str, str]:
        return {**self._source.problems, **self._problems}

    @property
    def watches(self) -> Sequence[WatchStats]:
        return self._source.watches

    async def events(self) -> AsyncGenerator[Sequence[ObjectEvent]]:
        self._is_synced = False
        self._has_names.clear()
        following = {"follow the source": self._source.events(), "resolve endpoints": self._resolutions()}
        async with merged(following) as next_batch:
            while (batch := await next_batch(None)) is not None:
                if events := await self._with_slices(batch):
                    yield events

    async def _resolutions(self) -> AsyncGenerator[Sequence[ObjectEvent]]:
        """Resolve the names once a second while there are any; yield an empty batch after each time."""
        while await self._has_names.wait():
            await self._resolve(after_s=_EVERY_S)
            yield ()

    async def _with_slices(self, batch: Sequence[ObjectEvent]) -> list[ObjectEvent]:
        """Return the events of *batch* with those of slices from DNS; wait for the first answers before SYNCED."""
        self._note_services(batch)
        synced = [event for event in batch if event.type is EventType.SYNCED]
        if synced and not self._is_synced:
            await self._resolve()
            self._is_synced = True
        if self._is_synced and (self._services or self._answers):
            self._has_names.set()
        else:
            self._has_names.clear()
        others = [event for event in batch if event.type is not EventType.SYNCED]
        return [*others, *self._slice_events(), *synced]

    def _note_services(self, events: Iterable[ObjectEvent]) -> None:
        for event in events:
            if event.kind == "Service" and event.name is not None:
                given = event.object
                if isinstance(given, api.Service) and (target := decode.dns_target(given)) is not None:
                    self._services[event.name] = given, target  # a changed one keeps its place
                else:
                    self._services.pop(event.name, None)

    def _resolved(self) -> Iterator[tuple[NamespacedName, api.Service, decode.DnsTarget]]:
        """Yield the Services whose names are asked for."""
        for name, (service, target) in islice(self._services.items(), _SERVICES_MAX):
            yield name, service, target

    # ---- questions

    async def _resolve(self, after_s: float = 0.0) -> None:
        await asyncio.sleep(after_s)
        keys = {(target.name, family) for _, _, target in self._resolved() for family in _TYPES}
        self._answers = {key: self._answers.get(key, _Answer()) for key in keys}
        servers = (await asyncio.to_thread(read_servers, self._resolv_conf))[:SERVERS_MAX] if keys else []
        await asyncio.gather(*(self._ask(name, family, servers) for name, family in keys))
        self._note_problems()

    async def _ask(self, name: str, family: str, servers: Sequence[str]) -> None:
        """Ask *servers* in turn, until one knows, and keep what it says."""
        answer = self._answers[name, family]
        question = messages.name_text(name) + struct.pack("!2H", _TYPES[family], messages.INTERNET)
        answer.error = "/etc/resolv.conf names no DNS server"
        for server in servers:
            answer.error = f"the DNS server {server} does not answer"
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, ValueError):
                async with asyncio.timeout(_TIMEOUT_S / len(servers)):
                    message = await exchange(server, question)
                rcode = message[3] & messages.RCODE_MASK
                answer.error = f"the DNS server {server} answers {messages.rcode_name(rcode)}"
                if rcode in (messages.NOERROR, messages.NXDOMAIN):
                    _keep(answer, messages.answer_addresses(message))
                    return

    def _note_problems(self) -> None:
        """Work out what to say of names that do not resolve; log which begin and end to."""
        before, self._problems = self._problems, {}
        for name in islice(self._services, _SERVICES_MAX, None):
            self._problems[f"Service {name}"] = (
                f"Service {name}: more than {_SERVICES_MAX} Services name their endpoints"
            )
        for name, _, target in self._resolved():
            answers = [self._answers.get((target.name, family), _Answer()) for family in _TYPES]
            if all(answer.error for answer in answers):
                its = (NamespacedName(name.namespace, _slice_name(name.name, family)) for family in _TYPES)
                kept = sum(len(self._slices[key].endpoints or ()) for key in its if key in self._slices)
                reason = f"Service {name}: dns://{target.name} gives no addresses: {answers[0].error}"
                self._problems[f"Service {name}"] = reason + (f"; its last {kept} stay in use" if kept else "")
        for place in self._problems.keys() - before.keys():
            log.warning("%s", self._problems[place])
        for place in before.keys() - self._problems.keys():
            log.info("%s: its name gives addresses again", place)

    # ---- endpoints

    def _slice_events(self) -> Iterator[ObjectEvent]:
        """Yield the EndpointSlices that differ from those that the tracker has."""
        before, self._slices = self._slices, self._wanted_slices()
        for gone in before.keys() - self._slices.keys():
            yield ObjectEvent(EventType.DELETE, "EndpointSlice", gone)
        for its, piece in self._slices.items():
            if before.get(its) != piece:
                yield ObjectEvent(EventType.SET, "EndpointSlice", its, piece)

    def _wanted_slices(self) -> dict[NamespacedName, api.EndpointSlice]:
        wanted: dict[NamespacedName, api.EndpointSlice] = {}
        for (namespace, name), service, target in self._resolved():
            for family in _TYPES:
                its = NamespacedName(namespace, _slice_name(name, family))
                answer = self._answers.get((target.name, family), _Answer())
                if answer.addresses:
                    wanted[its] = _slice(its.name, service, target, family, answer.addresses)
                elif not answer.is_known and its in self._slices:
                    wanted[its] = self._slices[its]  # those of an earlier name, until this one has been answered
        return wanted


def _slice_name(service: str, family: str) -> str:
    """Return a name that no object of the API has."""
    return f"{service} from DNS, {family}"


def _keep(answer: _Answer, addresses: Sequence[str]) -> None:
    if addresses:
        answer.addresses = tuple(sorted(set(addresses))[:_ADDRESSES_MAX])
        answer.denials, answer.error, answer.is_known = 0, "", True
        return
    answer.denials += 1
    answer.error = "the name has none"
    if answer.denials >= _DENIALS:
        answer.addresses, answer.is_known = (), True


def _slice(
    name: str, service: api.Service, target: decode.DnsTarget, family: str, addresses: Iterable[str]
) -> api.EndpointSlice:
    ports = [
        EndpointPort(target.port or decode.target_port(p, _NO_POD) or p.port, p.name, p.protocol)
        for p in (service.spec.ports if service.spec else None) or ()
    ]
    labels = {decode.SERVICE_NAME_LABEL: service.metadata.name}
    return api.EndpointSlice(ObjectMeta(name, labels=labels), family, [SliceEndpoint([ip]) for ip in addresses], ports)
