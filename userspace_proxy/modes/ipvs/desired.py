"""What all service ports together want in ipvs mode: virtual servers and addresses, at the cost of changes. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from userspace_proxy.interfaces import Translation
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.service import Portal
from userspace_proxy.modes.ipvs.table import VirtualServers, virtual_ips, virtual_servers


class Wanted:
    """``servers``: all that are wanted; ``ips``: how many service ports want each address of a portal's.

    A node port of one service port and an external IP of another may meet at an address of this node: the external IP
    has it, as nftables looks up whole portals first.
    """

    def __init__(self) -> None:
        self.servers: VirtualServers = {}
        self.ips: Counter[str] = Counter()
        self.translations: dict[ServicePortName, Translation] = {}
        self._of: dict[ServicePortName, VirtualServers] = {}
        self._at_portals: VirtualServers = {}
        self._at_node_ports: VirtualServers = {}

    def change(
        self,
        names: Iterable[ServicePortName],
        translations: Mapping[ServicePortName, Translation],
        node_ips: Iterable[str],
        scheduler: str,
        missing: Collection[str] = (),
    ) -> set[Portal]:
        """Know of *names* that they want what they have in *translations*; return the portals that this is about."""
        names, node_ips = list(names), tuple(node_ips)
        touched: set[Portal] = set()
        for name in names:
            if (was := self.translations.pop(name, None)) is not None:
                touched |= self._give_up(was)
        for name in names:
            if (made := translations.get(name)) is not None:
                self.translations[name] = made
                servers = self._of[name] = virtual_servers(made, node_ips, scheduler, missing)
                for portal in servers:
                    self._layer(made, portal)[portal] = servers[portal]
                self.ips.update(virtual_ips(made))
                touched |= servers.keys()
        for portal in touched:
            server = self._at_portals.get(portal) or self._at_node_ports.get(portal)
            if server is None:
                self.servers.pop(portal, None)
            else:
                self.servers[portal] = server
        return touched

    def _give_up(self, was: Translation) -> set[Portal]:
        servers = self._of.pop(was.service_port.name)
        for portal in servers:
            del self._layer(was, portal)[portal]
        for ip in virtual_ips(was):
            self.ips[ip] -= 1
            if not self.ips[ip]:
                del self.ips[ip]
        return set(servers)

    def _layer(self, translation: Translation, portal: Portal) -> VirtualServers:
        """Return where *portal* is held: one of *translation*'s own, or an address of the node's with a node port."""
        is_own = any(route.portal == portal for route in translation.routes)
        return self._at_portals if is_own else self._at_node_ports
