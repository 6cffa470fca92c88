"""Which version of each object was told, so that nothing is told twice and nothing dead comes back. Pure.

Versions are the API's resourceVersions: numbers that rise with every write of a kind (KEP-5504), deletions
included. So they tell what is older, also where a delivery is repeated or out of order; uids are not needed.
"""

from __future__ import annotations

from collections.abc import Mapping

from userspace_proxy.model.names import NamespacedName

_NONE = -1  # older than any


class Versions:
    """The latest that was told of each object of one kind."""

    def __init__(self) -> None:
        self._held: dict[NamespacedName, int] = {}
        self._deleted: dict[NamespacedName, int] = {}  # since `_covered`: what is older must not come back
        self._covered = _NONE  # all up to here was told

    def sets(self, name: NamespacedName, version: int) -> bool:
        """Note that *name* was written; return whether that is news."""
        known = max(self._covered, self._held.get(name, _NONE), self._deleted.get(name, _NONE))
        if version <= known:
            return False
        self._held[name] = version
        self._deleted.pop(name, None)
        return True

    def deletes(self, name: NamespacedName, version: int) -> bool:
        """Note that *name* was deleted; return whether that is news."""
        if version <= self._covered or version < self._held.get(name, _NONE):
            return False
        self._deleted[name] = max(version, self._deleted.get(name, _NONE))
        return self._held.pop(name, None) is not None

    def covers(self, version: int) -> None:
        """Note that all up to *version* was told (a bookmark says so)."""
        self._covered = max(self._covered, version)
        self._deleted = {name: at for name, at in self._deleted.items() if at > version}

    def replace(
        self, listed: Mapping[NamespacedName, int], version: int
    ) -> tuple[list[NamespacedName], list[NamespacedName]]:
        """Note that at *version* exactly *listed* was there; return which of it are news, and which are gone.

        *version* may be lower than what was seen before: then the cluster was restored from a backup.
        """
        news = [name for name, at in listed.items() if self._held.get(name) != at]
        gone = [name for name in self._held if name not in listed]
        self._held, self._deleted, self._covered = dict(listed), {}, version
        return news, gone

    def forget(self) -> None:
        """Hold every object at no version, so that the next list tells all, and what is gone, once more."""
        self._held = dict.fromkeys(self._held, _NONE)
