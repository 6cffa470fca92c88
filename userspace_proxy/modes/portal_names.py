"""Portals in words, for the reasons of rules. Pure."""

from collections.abc import Collection, Iterable

from userspace_proxy.model.endpoint import family_of, join_address
from userspace_proxy.model.service import Portal, ServicePort, internal_portals, load_balancer_portals, portals


class PortalNames:
    """Puts portals in words, with their kind: cluster IP, external IP, load balancer IP or node port."""

    def __init__(self, service_ports: Iterable[ServicePort]) -> None:
        self._kinds: dict[tuple[str, int, str], str] = {}
        for service_port in service_ports:
            inside, balanced = set(internal_portals(service_port)), set(load_balancer_portals(service_port))
            for portal in portals(service_port):
                self._kinds.setdefault(_key(portal), _kind(portal, inside, balanced))

    def of(self, portal: Portal) -> str:
        """Return *portal* in words, with its kind if it is known."""
        return self.portal("" if portal.is_node_port else portal.ip, str(portal.port), portal.protocol)

    def portal(self, ip: str, port: str, protocol: str) -> str:
        """Return a portal in words; *ip* is "" for a node port."""
        kind = self._kinds.get((ip, int(port), protocol.upper()), "")
        if not ip:
            return f"the node port {port} ({protocol.upper()})"
        if not kind and ("", int(port), protocol.upper()) in self._kinds:
            kind = "node port"  # at one address of the node
        return f"{f'the {kind} ' if kind else ''}{join_address(ip, int(port))} ({protocol.upper()})"


def _kind(portal: Portal, inside: Collection[Portal], balanced: Collection[Portal]) -> str:
    if portal in inside:
        return "cluster IP"
    return "load balancer IP" if portal in balanced else "external IP"


def _key(portal: Portal) -> tuple[str, int, str]:
    return ("" if portal.is_node_port else portal.ip, portal.port, portal.protocol)


def host(cidr: str) -> str:
    """Return *cidr*, without its length if it is a single address."""
    address, _, bits = cidr.partition("/")
    return address if bits in ("", "32" if family_of(address) == 4 else "128") else cidr
