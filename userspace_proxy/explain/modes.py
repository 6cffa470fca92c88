"""Every mode that can be shown, and who explains its rules. Pure.

A mode is plugged in by a line in `READERS`; the order there is the order in which they are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from userspace_proxy.modes.ipvs import explain as ipvs
from userspace_proxy.modes.reasons import nft_text
from userspace_proxy.modes.reasons.known import Known
from userspace_proxy.modes.reasons.lines import Explained, Line, Way
from userspace_proxy.modes.rule_line import Rules
from userspace_proxy.modes.slots import explain as slots

# From the rules as text, and what is known of their Services, to lines; with True, to those that some packet needs.
Reader = Callable[[str, Known, bool], Iterable[Line]]


def _nftables(text: str, known: Known, is_short: bool) -> Iterable[Line]:
    table = nft_text.parse(text)
    shown = nft_text.without_the_useless(table, slots.dead_rules(table)) if is_short else table
    return nft_text.write(shown, slots.explainer(table, known))


def _ipvs(text: str, known: Known, is_short: bool) -> Iterable[Line]:
    return ipvs.lines(text, known, is_short=is_short)


READERS: Mapping[Way, Reader] = {
    Way("nftables", "nftables"): _nftables,
    Way("ipvs", "ipvsadm"): _ipvs,
}

WAYS = (Way("userspace", "nftables"), Way("userspace", "iptables"), Way("iptables", "iptables"), *READERS)


def ways(mode: str, rules: str) -> list[Way]:
    """Return the ways of *mode*, "all" for every one; *rules* is the language of userspace mode."""
    language = "iptables" if rules == "iptables" else "nftables"
    return [
        way for way in WAYS if mode == "all" or (way.mode == mode and (mode != "userspace" or way.language == language))
    ]


def explained(way: Way, rules: Rules | str, known: Known, *, is_short: bool) -> Explained:
    """Return the lines of *rules* with their reasons. *is_short*: without lines that affect no packet to a Service."""
    if isinstance(rules, str):
        return Explained(way, tuple(READERS[way](rules, known, is_short)))
    shown = rules.without_unused() if is_short else rules
    return Explained(way, tuple(line.explained(known) for line in shown.lines()))
