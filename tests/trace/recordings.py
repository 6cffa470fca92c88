"""The kernel's trace messages in each mode, recorded by ``python -m tools.drawings --print``."""

from __future__ import annotations

from pathlib import Path

import msgspec

from userspace_proxy.trace.analysis import Recording, analyse
from userspace_proxy.trace.values import Hook, Leg, PacketRole, PacketTrace, Visit

_RECORDED = Path(__file__).parent / "recorded"
MODES = ("userspace", "userspace-iptables", "nftables", "iptables", "ipvs")


def recording(mode: str) -> Recording:
    return msgspec.json.decode((_RECORDED / f"{mode}.json").read_bytes(), type=Recording)


def trace(mode: str) -> PacketTrace:
    return analyse(recording(mode))


def leg(mode: str, role: PacketRole) -> Leg:
    found = trace(mode).leg(role)
    assert found is not None
    return found


def hook(of: Leg, name: str) -> Hook:
    return next(one for one in of.hooks if one.name == name)


def visit(of: Hook, chain: str) -> Visit:
    return next(one for one in of.visits if f"{one.family} {one.table} {one.chain}" == chain)
