"""What the lines of an iptables-restore script that are no rules are for. Pure."""

from __future__ import annotations

from collections.abc import Callable

from userspace_proxy.modes.reasons.xtables_text import Section

TABLES = {
    "mangle": (
        "The table mangle: before NAT. What is to be dropped meets its end here, as iptables forbids that in NAT."
    ),
    "nat": (
        "The table nat: rules see the first packet of each connection only; conntrack does the same to all later ones."
    ),
    "filter": "The table filter: what may pass.",
}
LOOPS_SAID = (
    "Packets to cluster IPs that nobody serves, about to leave by lo, where a node without a default route sends them."
)
NO_LOOP_SAID = "They would come in again, round after round, until their TTL is used up. Their sender gets {}."
TOOLS = {
    "# iptables-restore --noflush": "IPv4. --noflush: what others have in these tables stays.",
    "# ip6tables-restore --noflush": "IPv6. --noflush: what others have in these tables stays.",
}
_MAKES = " (A line with a colon makes a chain, or empties it.)"
COMMIT = "The end of this table: the kernel takes all of it at once, or nothing."


def explain_frame(section: Section | None, line: str, chains: Callable[[str, str], str]) -> str:
    """Return what is said of a line that is no rule; *chains* says what (table, chain) is for."""
    if section is None:
        return TOOLS.get(line, "")
    if line == "COMMIT":
        return COMMIT
    if line.startswith("*"):
        return TABLES.get(line[1:], "")
    if line.startswith(":"):
        said = chains(section.name, line[1:].split()[0])
        return f"{said}{_MAKES if said and line == section.chains[0] else ''}"
    return ""
