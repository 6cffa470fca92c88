"""Redirects as nftables text. Pure.

One table of ours holds everything: maps from portal to proxy port, looked up in one step however many services
there are, hooked before other NAT (priority -105 runs before -100). For each sender that is told from others there
are maps of its own, and sets of what is dropped, before those for everybody.
A change of some portals is a change of some elements; nothing else is touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from userspace_proxy.host.network import LOCAL_ADDRESS4, LOCAL_ADDRESS6
from userspace_proxy.interfaces import DROPPED, OWN_MARK, Capture, Redirects
from userspace_proxy.model.endpoint import FAMILIES, Family
from userspace_proxy.model.routes import Sender
from userspace_proxy.model.service import Portal
from userspace_proxy.modes.userspace.transparent_replies import REPLY_RULE
from userspace_proxy.netfilter.nft_text import FORWARD_HOOK, NO_LOOP, comment, is_everything, merged, pod_cidrs

TABLE = "inet userspace_proxy"
_BASE_RULES = 3  # the jumps of the chains that the kernel calls, and NO_LOOP
_IP: Mapping[Family, str] = {4: "ip", 6: "ip6"}
# In the order in which they are asked for; what their sets are called.
_SENDERS = {Sender.NODE: "_for_node", Sender.POD: "_for_pods", Sender.ANYBODY: ""}


def table(redirects: Redirects) -> str:
    """Return the script that replaces our table, whole, whether or not there is one."""
    sets = _sets(redirects)
    declared = "".join(_declared(name, header, sets.get(name, {})) for name, header in _HEADERS.items())
    chains = "".join(_chain(name, rules) for name, rules in _chains(redirects).items())
    return f"""\
table {TABLE}
delete table {TABLE}
table {TABLE} {{
{declared}\
	chain prerouting {{
		type nat hook prerouting priority -105; policy accept;
		jump services
	}}
	chain output {{
		type nat hook output priority -105; policy accept;
		meta mark & {OWN_MARK:#x} == 0 jump services
	}}
	chain replies {{
		type filter hook prerouting priority -150; policy accept;
	}}
	chain forward {{
		{FORWARD_HOOK}
		{NO_LOOP}
	}}
{chains}\
}}
"""


def change(old: Redirects, new: Redirects) -> str:
    """Return the script that makes *new* of *old*, at the cost of what differs; "" where nothing does."""
    lines = []
    old_chains = _chains(old)
    for name, rules in _chains(new).items():
        if rules != old_chains[name]:
            lines += [f"flush chain {TABLE} {name}", f"table {TABLE} {{", _chain(name, rules) + "}"]
    gone, came = _difference(old, new)
    lines += [f"delete element {TABLE} {name} {{ {key} }}" for name, keys in gone.items() for key in keys]
    lines += [f"add element {TABLE} {name} {{ {e} }}" for name, keys in came.items() for e in keys.values()]
    return "\n".join([*lines, ""]) if lines else ""


def rules_in(redirects: Redirects) -> int:
    """Return how many rules our table has once *redirects* are loaded."""
    return _BASE_RULES + sum(map(len, _chains(redirects).values()))


def removal() -> str:
    """Return the script that removes our table; it succeeds where there is none."""
    return f"table {TABLE}\ndelete table {TABLE}\n"


# ---- chains


def _chains(redirects: Redirects) -> dict[str, list[str]]:
    """Return the rules that depend on *redirects*. A NAT chain sees the first packet of a connection, and no other."""
    return {
        "services": [f"meta nfproto ipv{family} jump services{family}" for family in FAMILIES],
        **{f"services{family}": list(_services(redirects, family)) for family in FAMILIES},
        "replies": [REPLY_RULE] if redirects.transparent else [],
        **{f"node_ports{family}": list(_node_ports(redirects, family)) for family in FAMILIES},
    }


def _services(redirects: Redirects, family: Family) -> Iterator[str]:
    ip = _IP[family]
    portal = f"{ip} daddr . meta l4proto . th dport"
    if redirects.allowed:
        yield f"{portal} @restricted{family} {portal} . {ip} saddr != @allowed{family} drop"
    yield from _lookups(redirects, family, portal, f"service_ips{family}")
    # Behind the services' own addresses, as one of these may be this node's.
    where = f"{ip} daddr {{ {', '.join(on)} }} " if (on := node_port_addresses(redirects, family)) else ""
    yield f"{where}fib daddr type local jump node_ports{family}"
    if redirects.refuse_port:
        # What comes to a proxy port itself is led to where nobody listens, and the kernel refuses it.
        guarded = "meta l4proto { tcp, udp } meta l4proto . th dport @proxy_ports"
        yield f"fib daddr type local {guarded} {_leads(redirects, family)}{redirects.refuse_port}"


def _node_ports(redirects: Redirects, family: Family) -> Iterator[str]:
    yield from _lookups(redirects, family, "meta l4proto . th dport", f"node_ports{family}")


def _lookups(redirects: Redirects, family: Family, key: str, name: str) -> Iterator[str]:
    """Yield the rules that look *key* up for each sender; a NAT chain drops for good, as nothing else sees the packet.

    `meta l4proto` has to be matched in the rule that translates.
    """
    for sender, suffix in _SENDERS.items():
        for who in _matches(sender, redirects, family):
            yield f"{who}{key} @dropped_{name}{suffix} drop"
            yield f"{who}meta l4proto {{ tcp, udp }} {_leads(redirects, family)}{key} map @{name}{suffix}"


def _matches(sender: Sender, redirects: Redirects, family: Family) -> Iterator[str]:
    """Yield what matches *sender*; nothing where it meets what everybody meets."""
    if sender is Sender.ANYBODY:
        yield ""
    elif not redirects.exceptions.get(sender):
        return
    elif sender is Sender.NODE:
        yield "fib saddr type local "
    elif redirects.pods is not None:
        if redirects.pods.interface:
            yield f'iifname "{redirects.pods.interface}" '
        elif cidrs := pod_cidrs(redirects.pods, family):
            yield f"{_IP[family]} saddr {{ {', '.join(cidrs)} }} "


def _leads(redirects: Redirects, family: Family) -> str:
    if redirects.capture is Capture.ADDRESS:
        return f"dnat {_IP[family]} to {LOCAL_ADDRESS4 if family == 4 else LOCAL_ADDRESS6} :"
    return "redirect to :"


def _chain(name: str, rules: Iterable[str]) -> str:
    return f"\tchain {name} {{\n" + "".join(f"\t\t{rule}\n" for rule in rules) + "\t}\n"


# ---- what iptables.py needs too


def node_port_addresses(redirects: Redirects, family: Family) -> tuple[str, ...]:
    """Return the networks of own addresses at which node ports are served; empty for all."""
    networks = merged(redirects.node_ports_on, family)
    return () if is_everything(networks) else networks


def restricted(redirects: Redirects, family: Family) -> Iterator[tuple[Portal, tuple[str, ...]]]:
    """Yield the portals that not everybody may dial, and the networks from which they may be dialled."""
    for portal, cidrs in redirects.allowed.items():
        if portal.family == family and not is_everything(networks := merged(cidrs, family)):
            yield portal, networks


# ---- sets and maps


def _headers() -> Iterator[tuple[str, str]]:
    port = "inet_proto . inet_service"
    for family in FAMILIES:
        address = f"ipv{family}_addr"
        for name, key in ((f"service_ips{family}", f"{address} . {port}"), (f"node_ports{family}", port)):
            for suffix in reversed(_SENDERS.values()):
                yield f"{name}{suffix}", f"map {name}{suffix} {{\n\t\ttype {key} : inet_service"
                yield f"dropped_{name}{suffix}", f"set dropped_{name}{suffix} {{\n\t\ttype {key}"
        yield f"restricted{family}", f"set restricted{family} {{\n\t\ttype {address} . {port}"
        header = f"set allowed{family} {{\n\t\ttype {address} . {port} . {address}; flags interval"
        yield f"allowed{family}", header
    comment = 'comment "reached through the maps only, never directly"'
    yield "proxy_ports", f"set proxy_ports {{\n\t\t{comment}\n\t\ttype {port}"


_HEADERS = dict(_headers())

# Name of a set -> key -> the element, as it is written down.
_Sets = dict[str, dict[str, str]]


def _sets(redirects: Redirects) -> _Sets:
    return _difference(Redirects(), redirects)[1]


def _difference(old: Redirects, new: Redirects) -> tuple[_Sets, _Sets]:
    """Return the elements that are in *old* only, and those in *new* only."""
    gone: _Sets = {}
    came: _Sets = {}
    for sender in _SENDERS:
        before, after = _ports(old, sender), _ports(new, sender)
        # An element that differs in its comment alone is replaced too: the comment says whose it is.
        for elements, redirects, ports, others, other_names in (
            (gone, old, before, after, new.names),
            (came, new, after, before, old.names),
        ):
            names = redirects.names
            for portal, port in ports.items():
                name = names.get(portal)
                if others.get(portal) != port or name != other_names.get(portal):
                    said = f' comment "{comment(name)}"' if name else ""
                    value = f" : {port}" if port != DROPPED else ""
                    key = _key(portal)
                    elements.setdefault(_place(sender, portal, port), {})[key] = f"{key}{said}{value}"
    for sets_before, sets_after in ((_ranges(old), _ranges(new)), (_guarded(old), _guarded(new))):
        for place in {**sets_before, **sets_after}:
            keys_before, keys_after = sets_before.get(place, {}), sets_after.get(place, {})
            gone[place] = {key: key for key in keys_before if key not in keys_after}
            came[place] = {key: key for key in keys_after if key not in keys_before}
    return gone, came


def _ports(redirects: Redirects, sender: Sender) -> Mapping[Portal, int]:
    return redirects.ports if sender is Sender.ANYBODY else redirects.exceptions.get(sender, {})


def _place(sender: Sender, portal: Portal, port: int) -> str:
    name = f"{'node_ports' if portal.is_node_port else 'service_ips'}{portal.family}{_SENDERS[sender]}"
    return f"dropped_{name}" if port == DROPPED else name


def _key(portal: Portal) -> str:
    port = f"{portal.protocol.lower()} . {portal.port}"
    return port if portal.is_node_port else f"{portal.ip} . {port}"


def _ranges(redirects: Redirects) -> _Sets:
    sets: _Sets = {}
    for family in FAMILIES:
        for portal, networks in restricted(redirects, family):
            key = _key(portal)
            sets.setdefault(f"restricted{family}", {})[key] = key
            allowed = {f"{key} . {network}": f"{key} . {network}" for network in networks}
            sets.setdefault(f"allowed{family}", {}).update(allowed)
    return sets


def _guarded(redirects: Redirects) -> _Sets:
    levels = (_ports(redirects, sender) for sender in reversed(_SENDERS))
    ports = {(portal.protocol, port): None for level in levels for portal, port in level.items() if port != DROPPED}
    return {"proxy_ports": {(key := f"{protocol.lower()} . {port}"): key for protocol, port in ports}}


def _declared(name: str, header: str, elements: Mapping[str, str]) -> str:
    return f"\t{header}{_listed(elements.values())}\n\t}}\n"


def _listed(elements: Iterable[str]) -> str:
    text = ",\n\t\t\t".join(elements)
    return f"\n\t\telements = {{\n\t\t\t{text} }}" if text else ""
