"""Runs the iptables tools: which ones are installed, of which variant, and the rules in the kernel."""

import re
from pathlib import Path

from userspace_proxy.host.tool import is_installed, run_tool
from userspace_proxy.model.endpoint import Family
from userspace_proxy.netfilter.nfnetlink import table_names

# First version with --random-fully.
_RANDOM_FULLY = (1, 6, 2)
# The tables of the nf_tables variant, and where the kernel lists those of the legacy variant.
_TABLES = {"raw", "mangle", "nat", "filter", "security"}
_LEGACY_TABLES = Path("/proc/thread-self/net")

# Reject packets that would loop through lo, as nft_text.NO_LOOP does.
OUT_BY_LO = "-o lo"
NO_LOOP = "-j REJECT --reject-with icmp-host-unreachable"


def families() -> list[tuple[Family, str]]:
    """Return the address families with iptables tools installed, each with the prefix of its tools' names."""
    return [(4, "iptables"), (6, "ip6tables")] if is_installed("ip6tables-save") else [(4, "iptables")]


def families_in_use() -> list[tuple[Family, str]]:
    """Return those of `families` that may have rules, and whose rules can be read."""
    return [(family, tool) for family, tool in families() if _has_tables(tool) and is_installed(f"{tool}-save")]


def _has_tables(prefix: str) -> bool:
    """Return whether the kernel has tables of iptables. Mostly it has none, and the tools take long to say so."""
    family = "ip6" if prefix == "ip6tables" else "ip"
    try:
        if (_LEGACY_TABLES / f"{family}_tables_names").read_text():
            return True
    except FileNotFoundError:
        pass  # the kernel has no legacy variant
    except OSError:
        return True  # unknown
    try:
        return not _TABLES.isdisjoint(table_names(family))
    except OSError:
        return True


async def is_legacy() -> bool:
    """Return whether iptables is the legacy variant, which does not use nf_tables and sends no notices."""
    return "nf_tables" not in await run_tool("iptables", "--version")


async def knows_random_fully() -> bool:
    found = re.search(r"v(\d+)\.(\d+)\.(\d+)", await run_tool("iptables", "--version"))
    return found is not None and tuple(map(int, found.groups())) >= _RANDOM_FULLY


async def save(prefix: str) -> str:
    return await run_tool(f"{prefix}-save")


async def restore(prefix: str, script: str) -> None:
    """Load *script* without flushing other rules; each table in it is one transaction.

    Raises:
        SyncError: the kernel refused a transaction; earlier ones are in force.
    """
    if script:
        await run_tool(f"{prefix}-restore", "--noflush", "-w", "5", stdin=script)
