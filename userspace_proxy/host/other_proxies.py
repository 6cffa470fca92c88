"""Finds rules of another Service proxy, usually kube-proxy, that take the packets to an address first."""

import contextlib

from userspace_proxy.errors import SyncError
from userspace_proxy.host.tool import is_installed, run_tool

# kube-proxy's table and map in nftables mode (pkg/proxy/nftables/proxier.go), and its chain in the others.
_TABLE, _MAP, _CHAIN = "kube-proxy", "service-ips", "KUBE-SERVICES"
_DEVICE = "kube-ipvs0"


async def find_other_proxy(ip: str, port: int, protocol: str, *, shares_chains: bool) -> str:
    """Return where another proxy has rules for *ip*, *port* and *protocol* ("tcp", "udp"), "" if nowhere.

    *shares_chains*: this proxy's own rules are in chains with kube-proxy's names, so these prove nothing.
    """
    family, iptables = ("ip6", "ip6tables") if ":" in ip else ("ip", "iptables")
    if is_installed("nft"):
        with contextlib.suppress(SyncError):
            element = f"{{ {ip} . {protocol} . {port} }}"
            await run_tool("nft", "get", "element", family, _TABLE, _MAP, element)
            return f"nftables table '{family} {_TABLE}'"
    if not shares_chains and is_installed(iptables):
        with contextlib.suppress(SyncError):
            rules = (await run_tool(iptables, "-t", "nat", "-S", _CHAIN)).splitlines()
            if any(f" -d {ip}/" in rule and f"--dport {port} " in rule for rule in rules):
                return f"{iptables} chain {_CHAIN}"
    with contextlib.suppress(SyncError):
        if f" {ip}/" in await run_tool("ip", "-oneline", "address", "show", "dev", _DEVICE):
            return f"device {_DEVICE}"
    return ""
