"""The desired virtual servers and addresses of all service ports together. The cost follows the changes. Pure."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.service import Portal
from userspace_proxy.modes.ipvs.table import VirtualServers, virtual_ips, virtual_servers
from userspace_proxy.modes.kernel_rules import Translation


class DesiredServers:
    """All desired virtual servers (``servers``). ``ips``: the number of service ports with each portal address.

    A node port of one service port and an external IP of another can be the same address and port. The external IP
    takes precedence, as in the nftables rules, which look up whole portals first.
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
        """Replace the virtual servers of *names* by those in *translations*; return the portals affected."""
        names, node_ips = list(names), tuple(node_ips)
        portals: set[Portal] = set()
        for name in names:
            if (before := self.translations.pop(name, None)) is not None:
                portals |= self._remove(before)
        for name in names:
            if (made := translations.get(name)) is not None:
                portals |= self._add(made, virtual_servers(made, node_ips, scheduler, missing))
        for portal in portals:
            self._choose(portal)
        return portals

    def _choose(self, portal: Portal) -> None:
        server = self._at_portals.get(portal) or self._at_node_ports.get(portal)
        if server is None:
            self.servers.pop(portal, None)
        else:
            self.servers[portal] = server

    def _add(self, made: Translation, servers: VirtualServers) -> set[Portal]:
        name = made.service_port.name
        self.translations[name], self._of[name] = made, servers
        for portal, server in servers.items():
            self._layer(made, portal)[portal] = server
        self.ips.update(virtual_ips(made))
        return set(servers)

    def _remove(self, before: Translation) -> set[Portal]:
        servers = self._of.pop(before.service_port.name)
        for portal in servers:
            del self._layer(before, portal)[portal]
        self.ips.subtract(virtual_ips(before))
        for ip in virtual_ips(before):
            if not self.ips[ip]:
                del self.ips[ip]
        return set(servers)

    def _layer(self, translation: Translation, portal: Portal) -> VirtualServers:
        """Return where *portal* belongs: to the portals of *translation*, or to node ports at a node's address."""
        is_own = any(route.portal == portal for route in translation.routes)
        return self._at_portals if is_own else self._at_node_ports
