"""Decide which service port gets a portal that several service ports claim. Pure, but for a log line."""

import logging
from collections.abc import Iterable, Set

from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.service import Portal

log = logging.getLogger(__name__)


class PortalOwners:
    """The first service port that claims a portal owns it; the next one gets it when the owner gives it up.

    `control` settles claims of Services. This is for what it cannot know of, such as two Services with one cluster IP,
    one of them from a saved state: rules with a portal twice would be refused as a whole.
    """

    def __init__(self) -> None:
        self._owners: dict[Portal, ServicePortName] = {}
        self._waiting: dict[Portal, list[ServicePortName]] = {}  # other claimants; there are hardly ever any

    def owner(self, portal: Portal) -> ServicePortName | None:
        return self._owners.get(portal)

    def claim(self, name: ServicePortName, portals: Set[Portal], owned: Iterable[Portal]) -> set[ServicePortName]:
        """Let *name*, the owner of *owned*, claim exactly *portals*; return the new owners of those it gives up."""
        for portal in [p for p, names in self._waiting.items() if name in names and p not in portals]:
            self._stop_waiting(portal, name)
        for portal in portals:
            owner = self._owners.setdefault(portal, name)
            if owner != name and name not in (waiting := self._waiting.setdefault(portal, [])):
                log.warning("%s is claimed by %s and by %s; the first has it", portal, owner, name)
                waiting.append(name)
        given_up = [portal for portal in owned if portal not in portals and self._owners[portal] == name]
        return {new_owner for portal in given_up if (new_owner := self._give_up(portal))}

    def _give_up(self, portal: Portal) -> ServicePortName | None:
        """Take *portal* from its owner; return the new one."""
        del self._owners[portal]
        if portal not in self._waiting:
            return None
        new_owner = self._owners[portal] = self._waiting[portal][0]
        self._stop_waiting(portal, new_owner)
        return new_owner

    def _stop_waiting(self, portal: Portal, name: ServicePortName) -> None:
        self._waiting[portal].remove(name)
        if not self._waiting[portal]:
            del self._waiting[portal]
