"""Addresses and ports that hosts use, and that no Service should get. Pure."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from userspace_proxy.control.pools import Network, NodePort, address_of
from userspace_proxy.model.service import Portal

_SSH = 22
# kubelet, kube-proxy (10249, 10256: this proxy's own default addresses), controller manager, scheduler.
_OF_KUBERNETES = range(10_248, 10_260)


def nothing_listens() -> Collection[NodePort]:
    return ()


@dataclass(frozen=True, slots=True)
class Hosts:
    """This node's addresses, the networks it is attached to, and a function that lists its listening ports.

    ``dns``: the addresses of cluster DNS, once no Service held them.
    """

    addresses: Collection[str] = ()
    networks: Sequence[Network] = ()
    listening: Callable[[], Collection[NodePort]] = nothing_listens
    dns: Collection[str] = ()

    def cluster_ip_fault(self, ip: str, ranges: Sequence[Network]) -> str:
        """Return why *ip* (canonical) should not be a cluster IP from *ranges*, or "" if it may be."""
        if ip in self.addresses:
            return f"{ip} is an address of this node"
        if ip in self.dns:
            return f"{ip} is the address of cluster DNS (--dns)"
        address = address_of(ip)
        if network := next((network for network in self.networks if address in network), None):
            return f"{ip} is in {network}, a network of this node, and may be another host's"
        of_family = [network for network in ranges if network.version == address.version]
        inside = next((network for network in of_family if address in network), None)
        if inside is None:
            return f"{ip} is outside of the Service range {', '.join(map(str, of_family))}" if of_family else ""
        if inside.num_addresses > 2 and address == inside.network_address:
            return f"{ip} is the network address of the Service range {inside}"
        if inside.version == 4 and inside.num_addresses > 2 and address == inside.broadcast_address:
            return f"{ip} is the broadcast address of the Service range {inside}"
        return ""

    def portal_fault(self, portal: Portal) -> str:
        """Return why *portal*, at an external or load balancer IP, would take traffic of this node, or ""."""
        if portal.ip not in self.addresses:
            return ""
        why = self.node_port_fault(NodePort(portal.protocol, portal.port))
        return why and f"{portal.ip} is an address of this node, and {why}"

    def node_port_fault(self, port: NodePort) -> str:
        """Return why *port* should not be a node port, or "" if it may be."""
        if why := reserved_port_fault(port):
            return why
        return f"this node listens at {port.protocol} port {port}" if port in self.listening() else ""


def reserved_port_fault(port: NodePort) -> str:
    """Return the program of the node that *port* is reserved for, such as the kubelet, or ""."""
    if port.protocol == "TCP" and port.number == _SSH:
        return f"{port} is the port of SSH"
    if port.protocol == "TCP" and port.number in _OF_KUBERNETES:
        return f"{port} is a port of Kubernetes' own components, such as 10249 and 10256 of this proxy"
    return ""
