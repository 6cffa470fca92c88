"""Redirects as nftables text. Pure.

One table of ours holds everything: a map from portal to proxy port for each family, looked up in one
step however many services there are, hooked before other NAT (priority -105 runs before -100).
A change of some portals is a change of some map elements; nothing else is touched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from userspace_proxy.interfaces import OWN_MARK, Capture, Redirects
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.service import Portal

TABLE = "inet userspace_proxy"
# The private addresses on ``lo`` for Capture.ADDRESS.
LOCAL_ADDRESS4 = "169.254.77.7"
LOCAL_ADDRESS6 = "fd00:77::7"

_COMMENT_BYTES_MAX = 127  # and a zero behind it
_PORT_NAME_SHOWN = 24  # more than the 15 that a container's port name may have


def table(redirects: Redirects) -> str:
    """Return the script that replaces our table, whole, whether or not there is one."""
    return f"""\
table {TABLE}
delete table {TABLE}
table {TABLE} {{
	map service_ips4 {{
		comment "cluster and external IPs -> the proxy port of their service port"
		type ipv4_addr . inet_proto . inet_service : inet_service{_elements(redirects, 4)}
	}}
	map service_ips6 {{
		type ipv6_addr . inet_proto . inet_service : inet_service{_elements(redirects, 6)}
	}}
	map node_ports {{
		comment "ports on every address of this node"
		type inet_proto . inet_service : inet_service{_elements(redirects, None)}
	}}
	set proxy_ports {{
		comment "reached through the maps only, never directly"
		type inet_proto . inet_service{_guarded(redirects)}
	}}
	chain prerouting {{
		type nat hook prerouting priority -105; policy accept;
		jump services
	}}
	chain output {{
		type nat hook output priority -105; policy accept;
		meta mark & {OWN_MARK:#x} == 0 jump services
	}}
	chain services {{
{_rules(redirects)}
	}}
}}
"""


def change(old: Redirects, new: Redirects) -> str:
    """Return the script that makes *new* of *old*, at the cost of what differs; "" where nothing does."""
    lines = []
    if _rules(old) != _rules(new):
        chain = [f"table {TABLE} {{", "\tchain services {", _rules(new), "\t}", "}"]
        lines += [f"flush chain {TABLE} services", *chain]
    # An element that differs in its comment alone is replaced too: the comment says whose it is.
    gone = [p for p in old.ports if not _same(p, old, new)]
    came = [p for p in new.ports if not _same(p, old, new)]
    lines += [f"delete element {TABLE} {_map(p)} {{ {_key(p)} }}" for p in gone]
    lines += [f"add element {TABLE} {_map(p)} {{ {_element(p, new)} }}" for p in came]
    old_guarded, new_guarded = _guarded_ports(old), _guarded_ports(new)
    lines += [f"delete element {TABLE} proxy_ports {{ {e} }}" for e in old_guarded if e not in new_guarded]
    lines += [f"add element {TABLE} proxy_ports {{ {e} }}" for e in new_guarded if e not in old_guarded]
    return "\n".join([*lines, ""]) if lines else ""


def removal() -> str:
    """Return the script that removes our table; it succeeds where there is none."""
    return f"table {TABLE}\ndelete table {TABLE}\n"


def _rules(redirects: Redirects) -> str:
    """Return the rules of the chain `services`. A NAT chain sees the first packet of a connection, and no other.

    What comes to a proxy port itself is led to where nobody listens, and the kernel refuses it.
    """
    to4 = to6 = "redirect to :"
    if redirects.capture is Capture.ADDRESS:
        to4, to6 = f"dnat ip to {LOCAL_ADDRESS4} :", f"dnat ip6 to {LOCAL_ADDRESS6} :"
    match = "meta l4proto { tcp, udp }"
    port = "meta l4proto . th dport map"
    lines = [
        f"meta nfproto ipv4 {match} {to4}ip daddr . {port} @service_ips4",
        f"meta nfproto ipv6 {match} {to6}ip6 daddr . {port} @service_ips6",
        f"meta nfproto ipv4 fib daddr type local {match} {to4}{port} @node_ports",
        f"meta nfproto ipv6 fib daddr type local {match} {to6}{port} @node_ports",
    ]
    if redirects.refuse_port:
        guarded = f"{match} meta l4proto . th dport @proxy_ports"
        lines += [
            f"meta nfproto ipv4 fib daddr type local {guarded} {to4}{redirects.refuse_port}",
            f"meta nfproto ipv6 fib daddr type local {guarded} {to6}{redirects.refuse_port}",
        ]
    return "\n".join(f"\t\t{line}" for line in lines)


def _family(portal: Portal) -> int | None:
    if portal.ip is None:
        return None
    return 6 if ":" in portal.ip else 4


def _map(portal: Portal) -> str:
    return "node_ports" if portal.ip is None else f"service_ips{_family(portal)}"


def _key(portal: Portal) -> str:
    port = f"{portal.protocol.lower()} . {portal.port}"
    return f"{portal.ip} . {port}" if portal.ip else port


def _element(portal: Portal, redirects: Redirects) -> str:
    name = redirects.names.get(portal)
    said = f' comment "{comment(name)}"' if name else ""
    return f"{_key(portal)}{said} : {redirects.ports[portal]}"


def _elements(redirects: Redirects, family: int | None) -> str:
    return _listed(_element(portal, redirects) for portal in redirects.ports if _family(portal) == family)


def _same(portal: Portal, old: Redirects, new: Redirects) -> bool:
    return old.ports.get(portal) == new.ports.get(portal) and old.names.get(portal) == new.names.get(portal)


def _guarded_ports(redirects: Redirects) -> dict[str, None]:
    ports = ((portal.protocol, port) for portal, port in redirects.ports.items())
    return dict.fromkeys(f"{protocol.lower()} . {port}" for protocol, port in ports)


def _guarded(redirects: Redirects) -> str:
    return _listed(_guarded_ports(redirects))


def _listed(elements: Iterable[str]) -> str:
    text = ",\n\t\t\t".join(elements)
    return f"\n\t\telements = {{\n\t\t\t{text} }}" if text else ""


def comment(name: ServicePortName) -> str:
    """Return ``namespace/name:port`` in the 128 bytes that nft allows; what is too long gives way to a hash.

    The longest legal names need 191 bytes, and one comment too long fails the whole transaction. The Service's
    own name is always there, whole, and so is a port name of the usual length: people search for them.
    """
    text = str(name)
    if len(text) <= _COMMENT_BYTES_MAX:
        return text
    digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    port = f":{name.port_name[:_PORT_NAME_SHOWN]}" if name.port_name else ""
    ending = f"~{digest}/{name.service.name}{port}"
    return name.service.namespace[: _COMMENT_BYTES_MAX - len(ending)] + ending
