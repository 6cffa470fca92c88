"""The reasons of the elements in the sets and maps of a `SlotTable`. Pure."""

import struct
from functools import partial

from userspace_proxy.model.endpoint import join_address
from userspace_proxy.modes.portal_names import PortalNames
from userspace_proxy.modes.rule_line import Reason
from userspace_proxy.modes.service_table import Description, packets_of, restriction_reason
from userspace_proxy.modes.slots.packet_number import DROPPED, ENDPOINT_SET, MASQUERADED, OURS, PINNED, REJECTED
from userspace_proxy.netfilter.sets import Elements, SetKind, class_id, fields, key_fields


def leads(name: str) -> bool:
    """Return whether the map *name* holds the numbers of portals."""
    return name.startswith(("services", "node_ports"))


def unpacked(number: bytes) -> int:
    return int(struct.unpack("=I", number)[0])


def element_reason(name: str, kind: SetKind, key: bytes, value: bytes, found: Elements) -> Reason:
    """Return the reason of an element of the set or map *name*. *found*: all elements of the table."""
    parts, to = key_fields(kind, key), fields(kind.value, value)
    if leads(name):
        return partial(_led, packets_of(name, parts), unpacked(value))
    match name.partition("_")[0].rstrip("46"), parts, to:
        case "slots", [_, slot], [ip, port]:
            return f"Slot {slot}: {join_address(ip, int(port))}."
        case "picks", [_, slot], [number]:
            return partial(_pick, slot, number, value, found)
        case "endpoints", [number], [ip, port]:
            return f"The number {number} is the endpoint {join_address(ip, int(port))}."
        case "hairpins", [ip, _], _:
            return f"{ip} dialled a Service and was chosen itself."
        case "cluster", [ip], _:
            return f"{ip} is a cluster IP."
        case "virtual", [ip], _:
            return f"{ip} is a load balancer IP or an external IP."
        case "health", _, _:
            return "A health check node port."
        case "affinity", [number], _:
            timeout_s = name.rpartition("_")[2]
            return f"Clients of the endpoint set {number} keep their endpoint for {timeout_s} s."
        case "restricted" | "allowed", _, _:
            return restriction_reason(name, parts)
    raise AssertionError(f"no reason for an element of {name}")


def _led(describe: Description, number: int, names: PortalNames) -> str:
    packets = describe(names)
    if number == REJECTED:
        return f"{packets} are refused at once: there are no endpoints."
    if number == DROPPED:
        return f"{packets} are dropped: traffic policy Local, and no endpoint on this node."
    of_set = number & ENDPOINT_SET
    what = f"the virtual server there ({class_id(OURS)})" if of_set == OURS else f"the endpoint set {class_id(of_set)}"
    sentences = [f"{packets} are for {what}"]
    if number & MASQUERADED:
        sentences.append(f"{class_id(MASQUERADED)}: masquerade, so endpoints see this node's address")
    if number & PINNED:
        sentences.append(f"{class_id(PINNED)}: with affinity")
    return f"{'; '.join(sentences)}."


def _pick(slot: str, shown: str, number: bytes, found: Elements, _: PortalNames) -> str:
    for name, endpoints in found.items():
        if name.startswith("endpoints") and number in endpoints:
            ip, port = fields((f"ipv{name[len('endpoints')]}_addr", "inet_service"), endpoints[number])
            return f"Slot {slot}: endpoint {shown}, {join_address(ip, int(port))}."
    return f"Slot {slot}: endpoint {shown}."
