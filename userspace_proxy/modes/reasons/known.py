"""The kinds of portals, for explanations, and the choice of the Services to explain."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

from userspace_proxy.model.endpoint import family_of, join_address
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.redirects import Redirects
from userspace_proxy.model.service import Portal, ServicePort, internal_portals, load_balancer_portals, portals

_T = TypeVar("_T")


class Known:
    """Puts portals in words, with their kind: cluster IP, external IP, load balancer IP or node port."""

    def __init__(self, service_ports: Iterable[ServicePort]) -> None:
        self._kinds: dict[tuple[str, int, str], str] = {}
        for service_port in service_ports:
            inside, balanced = set(internal_portals(service_port)), set(load_balancer_portals(service_port))
            for portal in portals(service_port):
                self._kinds.setdefault(_key(portal), _kind(portal, inside, balanced))

    def portal_words(self, portal: Portal) -> str:
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


def chosen(wanted: str, service_ports: Iterable[ServicePort]) -> set[ServicePortName]:
    """Return the service ports that *wanted*, ``[namespace/]name[:port]``, means. The port is a name or a number.

    Raises:
        ValueError: there is none, or Services of several namespaces match.
    """
    service_ports = list(service_ports)
    service, _, port = wanted.partition(":")
    namespace, _, name = service.rpartition("/")
    found = {
        each.name
        for each in service_ports
        if each.name.service.name == name
        and namespace in ("", each.name.service.namespace)
        and port in ("", each.name.port_name, str(each.port))
    }
    if not found:
        there = ", ".join(dict.fromkeys(str(each.name) for each in service_ports)) or "no Service at all"
        raise ValueError(f"no Service is called {wanted!r}; there is: {there}")
    services = sorted({str(each.service) for each in found})
    if len(services) > 1:
        raise ValueError(f"{wanted!r} may be any of {', '.join(services)}")
    return found


def only(redirects: Redirects, names: Collection[ServicePortName]) -> Redirects:
    """Return the part of *redirects* for *names*."""

    def kept(of: Mapping[Portal, _T]) -> dict[Portal, _T]:
        return {portal: value for portal, value in of.items() if redirects.names.get(portal) in names}

    return replace(
        redirects,
        ports=kept(redirects.ports),
        exceptions={sender: kept(ports) for sender, ports in redirects.exceptions.items()},
        allowed=kept(redirects.allowed),
    )


def host(cidr: str) -> str:
    """Return *cidr*, without its length if it is a single address."""
    address, _, bits = cidr.partition("/")
    return address if bits in ("", "32" if family_of(address) == 4 else "128") else cidr
