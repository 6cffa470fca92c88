"""The tools of iptables: which there are, of which kind, and what rules are in the kernel."""

from __future__ import annotations

import re

from userspace_proxy.host.tool import is_installed, run_tool
from userspace_proxy.model.endpoint import Family

# From here on it knows --random-fully.
_RANDOM_FULLY = (1, 6, 2)

# What nothing serves is not forwarded out by lo, as in nft_text.NO_LOOP.
OUT_BY_LO = "-o lo"
NO_LOOP = "-j REJECT --reject-with icmp-host-unreachable"


def families() -> list[tuple[Family, str]]:
    """Return the families whose rules can be changed, with what the names of their tools begin with."""
    return [(4, "iptables"), (6, "ip6tables")] if is_installed("ip6tables-save") else [(4, "iptables")]


async def is_legacy() -> bool:
    """Return whether it has a way into the kernel of its own, which sends no notices, instead of nf_tables."""
    return "nf_tables" not in await run_tool("iptables", "--version")


async def knows_random_fully() -> bool:
    found = re.search(r"v(\d+)\.(\d+)\.(\d+)", await run_tool("iptables", "--version"))
    return found is not None and tuple(map(int, found.groups())) >= _RANDOM_FULLY


async def save(prefix: str) -> str:
    return await run_tool(f"{prefix}-save")


async def restore(prefix: str, script: str) -> None:
    """Load *script*, which is one transaction for each table in it, beside what is there.

    Raises:
        SyncError: the kernel refused a transaction; those before it are in force.
    """
    if script:
        await run_tool(f"{prefix}-restore", "--noflush", "-w", "5", stdin=script)
