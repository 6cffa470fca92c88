"""Whether syncs keep up with queued changes, per IP family, by kube-proxy's rule. Pure."""

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

FAMILY_NAMES = ("IPv4", "IPv6")


class FamilyHealth(NamedTuple):
    """Health of one IP family. ``updated_at``: wall-clock second of the last successful sync, None before the first."""

    healthy: bool
    updated_at: float | None


class SyncHealth:
    """Unhealthy if a queued change has waited longer than *timeout_s* for a successful sync (behaviours Z1).

    Healthy while no change is queued, however old the last sync is. A change queued during a sync waits for the next
    sync, and its wait starts when it is queued. *now* is a monotonic clock; *wall* gives the times shown to users.
    """

    def __init__(
        self,
        timeout_s: float,
        now: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._timeout_s = timeout_s
        self._now = now
        self._wall = wall
        self._waiting: dict[str, float] = {}  # family -> when its oldest change was queued; no sync has begun since
        self._under_way: dict[str, float] = {}  # the same for changes in the running sync
        self.queued_at: dict[str, float] = {}  # family -> wall-clock second of the latest queued change
        self.updated_at: dict[str, float] = {}

    def note_queued(self, families: Iterable[str] = FAMILY_NAMES) -> None:
        """Note that a change of *families* is queued."""
        now, at = self._now(), self._wall()
        for family in families:
            self._waiting.setdefault(family, now)
            self.queued_at[family] = at

    def note_begin(self) -> None:
        """Note that a sync begins. It covers every change queued so far."""
        self._under_way, self._waiting = self._waiting, {}

    def note_end(self, *, succeeded: bool) -> None:
        """Note that the sync ended. If it failed, its changes stay queued with their original times."""
        if succeeded:
            self.updated_at = dict.fromkeys(FAMILY_NAMES, self._wall())
        else:
            self._waiting |= self._under_way  # of two times, the running sync's is the older
        self._under_way = {}

    def of_families(self) -> dict[str, FamilyHealth]:
        """Return the health of each IP family now."""
        oldest = self._waiting | self._under_way  # of two times, the running sync's is the older
        latest = self._now() - self._timeout_s
        return {
            family: FamilyHealth(family not in oldest or oldest[family] > latest, self.updated_at.get(family))
            for family in FAMILY_NAMES
        }
