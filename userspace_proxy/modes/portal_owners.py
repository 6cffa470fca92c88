"""Decide which service port gets a portal that several service ports claim. Pure, but for a log line."""

import logging
from collections.abc import Iterable

from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.service import Portal

log = logging.getLogger(__name__)


class PortalOwners:
    """The first service port that claims a portal owns it; the next one gets it when the owner gives it up.

    ``new``: the service ports that have claimed a portal for the first time; the caller clears the set.
    """

    def __init__(self) -> None:
        self._claimants: dict[Portal, list[ServicePortName]] = {}
        self._portals: dict[ServicePortName, set[Portal]] = {}
        self.new: set[ServicePortName] = set()

    def owner(self, portal: Portal) -> ServicePortName | None:
        claimants = self._claimants.get(portal)
        return claimants[0] if claimants else None

    def claim(self, name: ServicePortName, portals: set[Portal]) -> set[ServicePortName]:
        """Let *name* claim exactly *portals*; return the new owners of portals that it gave up."""
        before = self._portals.get(name)
        if before is None:
            self.new.add(name)
            before = set()
        self._portals[name] = portals
        for portal in portals - before:
            claimants = self._claimants.setdefault(portal, [])
            claimants.append(name)
            if len(claimants) > 1:
                warn_of_claim(portal, claimants[0], name)
        return self._leave(name, before - portals)

    def give_up(self, name: ServicePortName) -> set[ServicePortName]:
        """Let *name* claim nothing; return the new owners of its portals."""
        self.new.discard(name)
        return self._leave(name, self._portals.pop(name, set()))

    def _leave(self, name: ServicePortName, portals: Iterable[Portal]) -> set[ServicePortName]:
        new_owners = set()
        for portal in portals:
            claimants = self._claimants[portal]
            was_owner = claimants[0] == name
            claimants.remove(name)
            if not claimants:
                del self._claimants[portal]
            elif was_owner:
                new_owners.add(claimants[0])
        return new_owners


def warn_of_claim(portal: Portal, owner: ServicePortName, claimant: ServicePortName) -> None:
    log.warning("%s is claimed by %s and by %s; the first has it", portal, owner, claimant)
