"""The nftables table of kernel mode nftables: its elements, and what is to be known of them elsewhere. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from userspace_proxy.model.endpoint import join_address
from userspace_proxy.modes.reasons.known import Known
from userspace_proxy.modes.reasons.lines import said_of
from userspace_proxy.modes.reasons.nft_common import SENDERS
from userspace_proxy.modes.reasons.nft_text import Block, Explainer, Said, Table
from userspace_proxy.modes.slots.explain_rules import FRAME, NAMED, NUMBER, RULES

_IP = r"[\da-f.:]+"
_KEY = rf"(?:(?P<ip>{_IP}) \. )?(?P<protocol>tcp|udp) \. (?P<port>\d+)"
_LED = re.compile(rf'{_KEY}(?: comment "(?P<name>[^"]+)")?(?: : (?P<number>{NUMBER}))?')
_ALLOWED = re.compile(rf"{_KEY} \. (?P<source>{_IP}(?:-{_IP})?)")
_SLOT = re.compile(rf"(?P<set>{NUMBER}) \. (?P<slot>\d+) : (?:(?P<ip>{_IP}) \. (?P<port>\d+)|(?P<seat>{NUMBER}))")
_ENDPOINT = re.compile(rf"(?P<seat>{NUMBER}) : (?P<ip>{_IP}) \. (?P<port>\d+)")

_REJECTED, _DROPPED = 1, 2


@dataclass(slots=True)
class _Scanned:
    """What a table says elsewhere: which bits of a number mean what, whose numbers are, and which endpoints."""

    masquerades: int = 0
    pins: int = 0
    mask: int = 0
    virtual_server: int = -1  # what IPVS leads on, where there is that
    owners: dict[int, str] = field(default_factory=dict)
    endpoints: dict[int, str] = field(default_factory=dict)
    values: set[int] = field(default_factory=set)


def number(text: str) -> int:
    """Return a number that nft shows as ``major:minor``, both in hexadecimal."""
    major, minor = text.split(":")
    return int(major, 16) << 16 | int(minor, 16)


def shown(value: int) -> str:
    return f"{value >> 16:x}:{value & 0xFFFF:x}"


def _scan(table: Table) -> _Scanned:
    found = _Scanned()
    rules = "\n".join(line for block in table.blocks if block.is_chain for line in block.items)
    if match := re.search(rf"meta priority & ({NUMBER}) == \1 meta mark set", rules):
        found.masquerades = number(match[1])
    if match := re.search(rf"meta priority & ({NUMBER}) == \1 goto pinned", rules):
        found.pins = number(match[1])
    if match := re.search(rf"meta priority & {NUMBER} == ({NUMBER}) accept", rules):
        found.virtual_server = number(match[1])
    if match := re.search(rf"meta priority set meta priority & ({NUMBER})", rules):
        found.mask = number(match[1])
    for block in table.blocks:
        if re.fullmatch(NAMED, block.name) and not block.is_chain:
            for line in block.items:
                if (match := _LED.fullmatch(line)) is not None and match["number"]:
                    value = number(match["number"])
                    found.values.add(value)
                    found.owners.setdefault(value & found.mask, match["name"] or "")
        elif block.name.startswith("endpoints"):
            for line in block.items:
                if match := _ENDPOINT.fullmatch(line):
                    found.endpoints[number(match["seat"])] = join_address(match["ip"], int(match["port"]))
    return found


def dead_rules(table: Table) -> Callable[[str], bool]:
    """Return what tells rules that match none of the numbers in *table*."""
    found = _scan(table)
    exactly = re.compile(rf"meta priority ({NUMBER}) (?:goto|drop).*")
    bit = re.compile(rf"meta priority & ({NUMBER}) == \1 (?:meta mark|goto).*")

    def is_dead(rule: str) -> bool:
        if match := exactly.fullmatch(rule):
            return number(match[1]) not in found.values
        if match := bit.fullmatch(rule):
            return not any(value & number(match[1]) for value in found.values)
        return False

    return is_dead


def explainer(table: Table, known: Known) -> Explainer:
    """Return what explains lines of *table*, which `slots.table` has rendered."""
    scanned = _scan(table)

    def explain(block: Block | None, line: str) -> Said:
        if block is None or line in block.head:
            return Said(said_of(line, FRAME))
        if block.is_chain:
            return Said(said_of(line, RULES))
        for prefix, element in _ELEMENTS.items():
            if block.name.startswith(prefix):
                return element(block, line, scanned, known)
        return Said("")

    return explain


def _led(block: Block, line: str, scanned: _Scanned, known: Known) -> Said:
    """Where packets to a portal are led."""
    if (match := _LED.fullmatch(line)) is None or not match["number"]:
        return Said("")
    portal = (match["ip"] or "", match["port"], match["protocol"])
    sender = next(said for suffix, said in SENDERS.items() if block.name.endswith(suffix))
    packets, owner = f"Packets{sender} to {known.portal(*portal)}", known.owner(*portal) or match["name"] or ""
    value = number(match["number"])
    if value == _REJECTED:
        return Said(f"{packets} are refused at once: there is no endpoint.", owner)
    if value == _DROPPED:
        return Said(f"{packets} are dropped: no endpoint of this node may take them.", owner)
    led = f"are for the endpoint set {shown(value & scanned.mask)}"
    if value & scanned.mask == scanned.virtual_server:
        led = f"are for the virtual server there ({shown(scanned.virtual_server)})"
    told = [f"{packets} {led}"]
    if value & scanned.masquerades:
        told.append(f"{shown(scanned.masquerades)}: endpoints see this node's address, not the client's")
    if value & scanned.pins:
        told.append(f"{shown(scanned.pins)}: with affinity")
    return Said("; ".join(told) + ".", owner)


def _slot(_: Block, line: str, scanned: _Scanned, __: Known) -> Said:
    if (match := _SLOT.fullmatch(line)) is None:
        return Said("")
    owner = scanned.owners.get(number(match["set"]), "")
    if match["ip"]:
        return Said(f"Slot {match['slot']}: {join_address(match['ip'], int(match['port']))}.", owner)
    address = scanned.endpoints.get(number(match["seat"]))
    return Said(f"Slot {match['slot']}: endpoint {match['seat']}{f', {address}' if address else ''}.", owner)


def _endpoint(_: Block, line: str, scanned: _Scanned, __: Known) -> Said:
    if (match := _ENDPOINT.fullmatch(line)) is None:
        return Said("")
    address = join_address(match["ip"], int(match["port"]))
    owner = scanned.owners.get(number(match["seat"]) & scanned.mask, "")
    return Said(f"The number {match['seat']} is the endpoint {address}.", owner)


def _hairpin(_: Block, line: str, __: _Scanned, ___: Known) -> Said:
    match = re.fullmatch(rf"(?P<ip>{_IP}) \. (?P=ip)", line)
    return Said(f"{match['ip']} that dialled a Service and was led to itself.") if match else Said("")


def _cluster_ip(_: Block, line: str, __: _Scanned, ___: Known) -> Said:
    return Said(f"{line} is a cluster IP.") if re.fullmatch(_IP, line) else Said("")


def _virtual_ip(_: Block, line: str, __: _Scanned, ___: Known) -> Said:
    return Said(f"{line} is a load balancer IP or an external IP.") if re.fullmatch(_IP, line) else Said("")


def _health_check(_: Block, line: str, __: _Scanned, ___: Known) -> Said:
    return Said("A port for health checks.") if re.fullmatch(r"tcp \. \d+", line) else Said("")


def _affinity(block: Block, line: str, scanned: _Scanned, _: Known) -> Said:
    if not re.fullmatch(NUMBER, line):
        return Said("")
    seconds = block.name.rpartition("_")[2]
    owner = scanned.owners.get(number(line), "")
    return Said(f"Clients of the endpoint set {line} keep their endpoint for {seconds} s.", owner)


def _restricted(_: Block, line: str, __: _Scanned, known: Known) -> Said:
    if (match := _LED.fullmatch(line)) is None:
        return Said("")
    portal = (match["ip"] or "", match["port"], match["protocol"])
    told = f"{known.portal(*portal)} may be dialled by senders in @allowed only."
    return Said(told[0].upper() + told[1:], known.owner(*portal) or match["name"] or "")


def _allowed(_: Block, line: str, __: _Scanned, known: Known) -> Said:
    if (match := _ALLOWED.fullmatch(line)) is None:
        return Said("")
    portal = (match["ip"] or "", match["port"], match["protocol"])
    told = f"{known.portal(*portal)} may be dialled from {match['source']}."
    return Said(told[0].upper() + told[1:], known.owner(*portal))


_ELEMENTS: Mapping[str, Callable[[Block, str, _Scanned, Known], Said]] = {
    "services": _led,
    "node_ports": _led,
    "slots": _slot,
    "picks": _slot,
    "endpoints": _endpoint,
    "hairpins": _hairpin,
    "cluster_ips": _cluster_ip,
    "virtual_ips": _virtual_ip,
    "health_checks": _health_check,
    "affinity": _affinity,
    "restricted": _restricted,
    "allowed": _allowed,
}
