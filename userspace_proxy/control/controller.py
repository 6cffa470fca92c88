"""The control loop: source -> tracker -> pacer -> state sinks, in order. After a failure, the last good state stays."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from userspace_proxy import api
from userspace_proxy.api.events import EventType, ObjectEvent
from userspace_proxy.control.decode import trigger_time
from userspace_proxy.control.journal import Journal
from userspace_proxy.control.pacer import Pacer
from userspace_proxy.control.tracker import Tracker
from userspace_proxy.errors import SyncError
from userspace_proxy.interfaces import Source, StateSink
from userspace_proxy.model.endpoint import Endpoint, difference
from userspace_proxy.model.histogram import SYNC_BOUNDS_S, Histogram
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.state import ProxyState
from userspace_proxy.model.sync_health import FAMILY_NAMES, SyncHealth
from userspace_proxy.model.topology import usable_endpoints

_ASK_AGAIN_S = 1.0
# kube-proxy's bounds, so that its dashboards fit.
_PROGRAMMING_BOUNDS_S = [0.25, 0.5, *range(1, 60), *range(60, 120, 5), *range(120, 301, 30)]

# API kind -> the label under which a change of it is counted.
_CHANGED = {"Service": "service", "EndpointSlice": "endpoint", "Endpoints": "endpoint", "Pod": "endpoint"}

# At most this many changed service ports are logged for one sync.
_CHANGES_LOGGED_MAX = 20

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Changes:
    """Counts changes: in total, and those that no successful sync has applied yet."""

    total: int = 0
    pending: int = 0


class Controller:
    """Applies what a source reports to the state sinks, in order, and retries until it succeeds.

    *filtered*: what sinks get of a desired state, such as its healthy endpoints. *loads*: counts the loads of rules, as
    a sync without one does not delay the next sync.
    ``synced_at``: wall-clock second of the last successful sync, None before the first; ``synced``: its state;
    ``desired``: the same before it was filtered.
    ``error``: the message of the last sync if it failed, else ""; ``failing_since``: when the failures began.
    ``durations``: how long successful syncs took. ``programming``: by IP family, from the change that made a controller
    write an EndpointSlice until it was in force. ``changes``: counts for Services and for their endpoints.
    """

    def __init__(
        self,
        source: Source,
        tracker: Tracker,
        sinks: Sequence[StateSink],
        pacer: Pacer,
        after_sync: Callable[[], None] = lambda: None,
        health_timeout_s: float = 60.0,
        filtered: Callable[[ProxyState], ProxyState] = lambda state: state,
        journal: Journal | None = None,
        loads: Callable[[], int] | None = None,
    ) -> None:
        self._source = source
        self._tracker = tracker
        self._sinks = sinks
        self._pacer = pacer
        self._after_sync = after_sync
        self._filtered = filtered
        self._journal = journal or Journal()
        self._loads = loads
        self._is_complete = False  # the source has reported every object
        self._changed = asyncio.Event()
        self.ready = asyncio.Event()
        self.attempted = asyncio.Event()
        self.synced_at: float | None = None
        self.synced = self.desired = ProxyState()
        self.failing_since: float | None = None
        self.error = ""
        self.syncs = 0
        self.failures = 0
        self.sync_health = SyncHealth(health_timeout_s)
        self.changes = {"service": Changes(), "endpoint": Changes()}
        self.durations = Histogram(SYNC_BOUNDS_S)
        self.programming = {family: Histogram(_PROGRAMMING_BOUNDS_S) for family in FAMILY_NAMES}
        self._started_at = time.time()
        self._triggers: list[tuple[str, float]] = []  # family and time of changes that no sync has applied yet

    def sync_again(self) -> None:
        """Sync soon, although no source reported a change: this host or the health of an endpoint has changed."""
        if self._is_complete:
            self._changed.set()

    async def run(self) -> None:
        """Run until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow(), name="follow")
            group.create_task(self._sync_for_ever(), name="sync")

    async def _follow(self) -> None:
        while True:
            try:
                async for events in self._source.events():
                    self._tracker.apply(events)
                    self._note(events)
                    self._is_complete |= any(event.type is EventType.SYNCED for event in events)
                    if self._is_complete:  # not before SYNCED: a partial state would remove Services that are served
                        self._changed.set()
                        self.sync_health.note_queued({family for event in events for family in _families(event)})
            except Exception:
                log.exception("a bug: the source failed; the state in force stays, and the source is started again")
            await asyncio.sleep(_ASK_AGAIN_S)

    def _note(self, events: Iterable[ObjectEvent]) -> None:
        for event in events:
            if (counter := _CHANGED.get(event.kind)) is not None:
                self.changes[counter].total += 1
                self.changes[counter].pending += 1
            if isinstance(event.object, api.EndpointSlice) and event.object.address_type in self.programming:
                at = trigger_time(event.object)
                if at is not None and at > self._started_at:  # changes from before the start would distort the latency
                    self._triggers.append((event.object.address_type, at))

    async def _sync_for_ever(self) -> None:
        while True:
            await self._changed.wait()
            await asyncio.sleep(self._pacer.delay_s())
            self._changed.clear()
            await self._sync()
            self.attempted.set()

    async def _sync(self) -> None:
        started_at = time.monotonic()
        triggers, self._triggers = self._triggers, []
        taken = {counter: changes.pending for counter, changes in self.changes.items()}
        self.sync_health.note_begin()
        loads = self._loads() if self._loads else 0
        try:
            desired = self._tracker.state()
            state = self._filtered(desired)
            for sink in self._sinks:
                await sink.sync(state)
        except SyncError as error:
            if self.error != str(error):
                log.error("the rules could not be loaded; the previous state stays in force: %s", error)  # noqa: TRY400
            self._note_failure(str(error), triggers)
            return
        except Exception as error:
            if self.error != repr(error):
                log.exception("a bug: a sync failed; the previous state stays in force")
            self._note_failure(repr(error), triggers)
            return
        self.synced, self.desired = state, desired
        took_s = time.monotonic() - started_at
        has_loaded = self._loads is None or self._loads() != loads
        self._pacer.note_end(succeeded=True, has_loaded=has_loaded, took_s=took_s)
        self._note_success(triggers, taken, took_s)
        self._log_changes(desired, self._tracker.take_endpoint_changes())

    def _log_changes(self, state: ProxyState, before: Mapping[ServicePortName, tuple[Endpoint, ...]]) -> None:
        """Log the service ports whose endpoints differ from *before*; after the first sync, log totals instead."""
        if not self.ready.is_set():
            self.ready.set()
            services = len({name.service for name in state.service_ports})
            without = sum(not usable_endpoints(known) for known in state.endpoints.values())
            reason = "ready: %d Services with %d service ports, %d of them without endpoints"
            log.info(reason, services, len(state.service_ports), without)
            return
        changed = {name: was for name, was in before.items() if was != state.endpoints.get(name, ())}
        for name in islice(changed, _CHANGES_LOGGED_MAX):
            what = difference(changed[name], state.endpoints.get(name, ()))
            log.info("%s: %s", name, what)
            self._journal.note(name.service, f"{name.port_name}: {what}" if name.port_name else what)
        if (more := len(changed) - _CHANGES_LOGGED_MAX) > 0:
            log.info("the endpoints of %d more service ports have changed", more)

    def _note_success(self, triggers: list[tuple[str, float]], taken: Mapping[str, int], took_s: float) -> None:
        """Note that a sync of the changes *taken* succeeded."""
        self.sync_health.note_end(succeeded=True)
        for counter, count in taken.items():
            self.changes[counter].pending -= count
        if self.error:
            log.info("the rules could be loaded again")
        self.error, self.failing_since = "", None
        self.synced_at = time.time()
        self.syncs += 1
        for family, at in triggers:
            self.programming[family].observe(max(0.0, self.synced_at - at))
        self._after_sync()
        self.durations.observe(took_s)
        log.debug("sync of %d service ports took %.1f ms", len(self.synced.service_ports), took_s * 1000)

    def _note_failure(self, error: str, triggers: list[tuple[str, float]]) -> None:
        self._triggers = triggers + self._triggers
        self._pacer.note_end(succeeded=False)
        self.sync_health.note_end(succeeded=False)
        self.failures += 1
        self._changed.set()  # try again
        self.failing_since = self.failing_since or time.time()
        self.error = error
        self._journal.note(None, f"a sync failed: {error}")


def _families(event: ObjectEvent) -> tuple[str, ...]:
    """Return the IP families whose traffic *event* may change: all families for a deletion, which has no object."""
    if isinstance(event.object, api.EndpointSlice):
        return tuple(family for family in FAMILY_NAMES if family == event.object.address_type)
    return FAMILY_NAMES
