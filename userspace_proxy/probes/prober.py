"""Probe endpoints at their intervals, from the control process: no probe delays traffic.

A target is in one place: in the heap until it is due, in the queue until it may start, or among the open ones. One
timer serves all: a probe has no task and no timer of its own. How many probes begin in a tick, and how many are open,
is bounded; what exceeds it begins later.
"""

import asyncio
import functools
import heapq
import itertools
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from userspace_proxy.dataplane.poller import Poller
from userspace_proxy.dataplane.sockets import LOCAL_SHORTAGES
from userspace_proxy.model.endpoint import Address, join_address
from userspace_proxy.model.histogram import SYNC_BOUNDS_S, Histogram
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.probe import HEALTHY, EndpointCondition, EndpointHealth, ProbeSpec
from userspace_proxy.probes.attempt import Attempt, Result

# To be woken costs more than a probe: probes that are due within one tick begin together.
TICK_S = 0.1
# 1,000 probes a second.
STARTS_A_TICK = 100
OPEN_MAX = 512
# An answer that this process was too busy to read is no failure: deadlines do not count time in which it was stalled.
_LATE_S = 0.1
# A probe may end this much before its deadline. It begins a little after its tick, and would otherwise end a tick late.
_EARLY_S = TICK_S / 10
# A shortage is logged once in this time.
_QUIET_S = 60.0
# The golden ratio: any number of first probes is spread evenly.
_SPREAD = (math.sqrt(5) - 1) / 2
# About so many targets that were removed may wait for their turn.
_GONE_MAX = 1_000
_RESULTS = ("success", "failure", "timeout", "skipped")

log = logging.getLogger(__name__)


@dataclass(slots=True)
class ProbeStats:
    """Counts of probes by result, how long successful ones took, and how late the last one began."""

    results: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_RESULTS, 0))
    durations: Histogram = field(default_factory=lambda: Histogram(SYNC_BOUNDS_S))
    targets: int = 0
    late_s: float = 0.0


class Target:
    """One endpoint with one health check, for all service ports that share both (``users``).

    ``health``: the verdict. A new target is healthy, and its first failed probe makes it unhealthy, as in HAProxy.
    """

    __slots__ = ("_against", "address", "attempt", "deadline", "due_at", "health", "spec", "started_at", "users")

    def __init__(self, address: Address, spec: ProbeSpec, due_at: float) -> None:
        self.address, self.spec, self.due_at = address, spec, due_at
        self.users: set[ServicePortName] = set()
        self.health = HEALTHY
        self.attempt: Attempt | None = None
        self.started_at = self.deadline = 0.0
        self._against = spec.fall - 1  # results in a row that contradict the verdict

    @property
    def is_healthy(self) -> bool:
        return self.health.condition is EndpointCondition.HEALTHY

    def note(self, failure: str) -> bool:
        """Count a result, "" for a success; return whether it changes the verdict."""
        is_success, spec = not failure, self.spec
        self._against = 0 if is_success == self.is_healthy else self._against + 1
        if self._against < (spec.rise if is_success else spec.fall):
            return False
        condition = EndpointCondition.HEALTHY if is_success else EndpointCondition.UNHEALTHY
        self.health = EndpointHealth(condition, time.time(), f"{spec}: {failure or 'it answers again'}")
        self._against = 0
        return True


class Prober:
    """Probes its targets. *on_change* is called with each target whose verdict changes. Use it in the loop's thread."""

    def __init__(self, on_change: Callable[[Target], None]) -> None:
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._poller: Poller | None = None
        self._due: list[tuple[float, int, Target]] = []
        self._numbers, self._phases = itertools.count(), itertools.count()
        self._waiting: deque[Target] = deque()
        self._open: set[Target] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._tick_at = 0.0
        self._quiet_until = 0.0
        self.stats = ProbeStats()

    # ---- targets

    def add(self, address: Address, spec: ProbeSpec) -> Target:
        """Return a new target. Its first probe begins within one interval."""
        self._poller = self._poller or Poller(self._loop)
        phase = next(self._phases) * _SPREAD % 1
        target = Target(address, spec, self._loop.time() + phase * spec.interval_s)
        self.stats.targets += 1
        self._wait(target)
        self._arm()
        return target

    def remove(self, target: Target) -> None:
        """Stop probing *target*, which has no users any more."""
        self.stats.targets -= 1
        self._end(target)
        # Removed targets stay in the queue until their turn, which may be an hour away: few of them, at least.
        if len(self._due) > 2 * self.stats.targets + _GONE_MAX:
            self._due = [due for due in self._due if due[2].users]
            heapq.heapify(self._due)

    def close(self) -> None:
        """Stop all probes."""
        for target in list(self._open):
            self._end(target)
        self._due.clear()
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()
        if self._poller is not None:
            self._poller.stop()

    # ---- time

    def _arm(self) -> None:
        """Set the timer to the next tick with something to do."""
        at = self._loop.time() if self._waiting or self._open else self._due[0][0] if self._due else math.inf
        if at == math.inf:
            return
        at = (at // TICK_S + 1) * TICK_S
        if self._timer is None or at < self._tick_at:
            if self._timer is not None:
                self._timer.cancel()
            self._timer, self._tick_at = self._loop.call_at(at, self._tick), at

    def _tick(self) -> None:
        self._timer = None
        now = self._loop.time()
        try:
            self._end_overdue(now)
            while self._due and self._due[0][0] <= now:
                self._waiting.append(heapq.heappop(self._due)[2])
            starts = min(STARTS_A_TICK, OPEN_MAX - len(self._open), len(self._waiting))
            starting = [target for target in (self._waiting.popleft() for _ in range(starts)) if target.users]
            for target in starting:
                self._start(target, now)
            for target in starting:
                self._follow(target)
        except Exception:
            log.exception("a bug: probes were not taken further")
        self._arm()

    def _end_overdue(self, now: float) -> None:
        """Fail the probes without an answer at their deadline."""
        late_s = now - self._tick_at
        for target in list(self._open):
            if late_s > _LATE_S:
                target.deadline += late_s
            if target.deadline <= now + _EARLY_S:
                self._finish(target, f"no answer within {target.spec.timeout_s:g} s", "timeout")

    def _wait(self, target: Target) -> None:
        heapq.heappush(self._due, (target.due_at, next(self._numbers), target))

    # ---- one probe

    def _start(self, target: Target, now: float) -> None:
        spec = target.spec
        self.stats.late_s = now - target.due_at
        target.due_at = max(target.due_at + spec.interval_s, now)
        target.started_at, target.deadline = now, now + spec.timeout_s
        self._open.add(target)
        try:
            target.attempt = Attempt(target.address, spec)
            self._advance(target)
        except OSError as error:
            self._skip(target, error)

    def _follow(self, target: Target) -> None:
        """Take the step that is possible by now: an endpoint of this node has accepted. Then wait for events."""
        self._on_event(target)
        if (attempt := target.attempt) is not None and self._poller is not None:
            try:
                self._poller.watch(attempt.sock, functools.partial(self._on_event, target))
                attempt.is_watched = True
            except OSError as error:
                self._skip(target, error)

    def _on_event(self, target: Target, _events: int = 0) -> None:
        try:
            self._advance(target)
        except OSError as error:
            self._skip(target, error)

    def _advance(self, target: Target) -> None:
        result: Result = None if target.attempt is None else target.attempt.advance()
        if result is not None:
            self._finish(target, result, "failure" if result else "success")

    def _finish(self, target: Target, failure: str, counted: str) -> None:
        self._end(target)
        self.stats.results[counted] += 1
        if not failure:
            self.stats.durations.observe(self._loop.time() - target.started_at)
        if target.note(failure):
            self._on_change(target)

    def _skip(self, target: Target, error: OSError) -> None:
        """Give up one probe because of a shortage of this host, or fail it if this host has no such address family."""
        if error.errno not in LOCAL_SHORTAGES:
            self._finish(target, os.strerror(error.errno or 0).lower(), "failure")
            return
        self._end(target)
        self.stats.results["skipped"] += 1
        if (now := self._loop.time()) >= self._quiet_until:
            log.warning("probes are skipped, such as that of %s: %s", join_address(*target.address), error.strerror)
            self._quiet_until = now + _QUIET_S

    def _end(self, target: Target) -> None:
        """Close the socket of *target*, and wait for its next probe."""
        if target not in self._open:
            return
        self._open.discard(target)
        attempt, target.attempt = target.attempt, None
        if attempt is not None and attempt.is_watched and self._poller is not None:
            self._poller.close(attempt.sock)
        elif attempt is not None:
            attempt.close()
        if target.users:
            self._wait(target)
