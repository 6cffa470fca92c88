"""Tracks the reported version of each object: nothing is reported twice, and nothing deleted comes back. Pure.

Versions are the API's resourceVersions, which increase with every write of a kind (KEP-5504), deletions included. They
order repeated and reordered deliveries; uids are not needed.
"""

from collections.abc import Mapping

from userspace_proxy.model.names import NamespacedName

_NONE = -1  # older than any


class Versions:
    """The latest reported version of each object of one kind."""

    def __init__(self) -> None:
        self._held: dict[NamespacedName, int] = {}
        self._deleted: dict[NamespacedName, int] = {}  # since `_covered`; older versions must not come back
        self._covered = _NONE  # everything up to this version was reported

    def sets(self, name: NamespacedName, version: int) -> bool:
        """Record a write of *name*; return whether it is new."""
        newest = max(self._covered, self._held.get(name, _NONE), self._deleted.get(name, _NONE))
        if version <= newest:
            return False
        self._held[name] = version
        self._deleted.pop(name, None)
        return True

    def deletes(self, name: NamespacedName, version: int) -> bool:
        """Record a deletion of *name*; return whether it is new."""
        if version <= self._covered or version < self._held.get(name, _NONE):
            return False
        self._deleted[name] = max(version, self._deleted.get(name, _NONE))
        return self._held.pop(name, None) is not None

    def covers(self, version: int) -> None:
        """Record that everything up to *version* was reported (as a bookmark states)."""
        self._covered = max(self._covered, version)
        self._deleted = {name: at for name, at in self._deleted.items() if at > version}

    def replace(
        self, listed: Mapping[NamespacedName, int], version: int
    ) -> tuple[list[NamespacedName], list[NamespacedName]]:
        """Record *listed* as all objects at *version*; return the new or changed ones, and the deleted ones.

        *version* may be lower than a version seen before, after the cluster is restored from a backup.
        """
        news = [name for name, at in listed.items() if self._held.get(name) != at]
        gone = [name for name in self._held if name not in listed]
        self._held, self._deleted, self._covered = dict(listed), {}, version
        return news, gone

    def forget(self) -> None:
        """Reset all versions, so that the next list reports every object again, and the deletions."""
        self._held = dict.fromkeys(self._held, _NONE)
