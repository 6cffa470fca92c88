"""Whether syncs keep up with what is asked for, by IP family: kube-proxy's rule. Pure."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

FAMILY_NAMES = ("IPv4", "IPv6")


class FamilyHealth(NamedTuple):
    """``updated_at``: wall-clock second of the last sync that succeeded, None before the first."""

    healthy: bool
    updated_at: float | None


class Freshness:
    """Unhealthy is who was asked for something *timeout_s* ago and has completed nothing since (behaviours Z1).

    Nothing asked: healthy, however long ago the last sync was. What is asked while a sync runs waits for the next
    one, from the moment when it was asked. *now* goes evenly; *wall* is what people read.
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
        self._waiting: dict[str, float] = {}  # family -> since when the oldest wish waits that no sync has taken up
        self._under_way: dict[str, float] = {}  # the same of those that a sync has taken up
        self.queued_at: dict[str, float] = {}  # wall-clock seconds of the latest wish
        self.updated_at: dict[str, float] = {}

    def note_queued(self, families: Iterable[str] = FAMILY_NAMES) -> None:
        """Something of *families* was asked for."""
        now, at = self._now(), self._wall()
        for family in families:
            self._waiting.setdefault(family, now)
            self.queued_at[family] = at

    def note_begin(self) -> None:
        """A sync takes up all that was asked for until now."""
        self._under_way, self._waiting = self._waiting, {}

    def note_end(self, *, succeeded: bool) -> None:
        """That sync has ended; one that failed leaves its wishes waiting, as old as they are."""
        if succeeded:
            self.updated_at = dict.fromkeys(FAMILY_NAMES, self._wall())
        else:
            self._waiting |= self._under_way  # the older of two
        self._under_way = {}

    def of_families(self) -> dict[str, FamilyHealth]:
        oldest = self._waiting | self._under_way  # what is under way waits for longer
        latest = self._now() - self._timeout_s
        return {
            family: FamilyHealth(family not in oldest or oldest[family] > latest, self.updated_at.get(family))
            for family in FAMILY_NAMES
        }
