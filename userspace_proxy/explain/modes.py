"""Every mode that can be shown, and who explains its rules. Pure.

A mode is plugged in by a line in `READERS`; the order there is the order in which they are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from userspace_proxy.modes.iptables import explain as kube
from userspace_proxy.modes.ipvs import explain as ipvs
from userspace_proxy.modes.reasons import nft_text, xtables_text
from userspace_proxy.modes.reasons.known import Known
from userspace_proxy.modes.reasons.lines import Explained, Line, Way
from userspace_proxy.modes.slots import explain as slots
from userspace_proxy.modes.userspace import explain_iptables as redirect_iptables
from userspace_proxy.modes.userspace import explain_nft as redirect_nft

# From the rules as text, and what is known of their Services, to lines; with True, to those that some packet needs.
Reader = Callable[[str, Known, bool], Iterable[Line]]


def _userspace_nft(text: str, known: Known, is_short: bool) -> Iterable[Line]:
    table = nft_text.parse(text)
    shown = nft_text.without_the_useless(table) if is_short else table
    return nft_text.write(shown, redirect_nft.explainer(known))


def _userspace_iptables(text: str, known: Known, is_short: bool) -> Iterable[Line]:
    families = xtables_text.parse(text)
    shown = xtables_text.without_the_useless(families, lambda _: False) if is_short else families
    return xtables_text.write(shown, redirect_iptables.explainer(known))


def _iptables(text: str, known: Known, is_short: bool) -> Iterable[Line]:
    families = xtables_text.parse(text)
    explain = kube.explainer(families, known)
    return xtables_text.write(kube.what_is_met(families) if is_short else families, explain)


def _nftables(text: str, known: Known, is_short: bool) -> Iterable[Line]:
    table = nft_text.parse(text)
    shown = nft_text.without_the_useless(table, slots.dead_rules(table)) if is_short else table
    return nft_text.write(shown, slots.explainer(table, known))


def _ipvs(text: str, known: Known, is_short: bool) -> Iterable[Line]:
    return ipvs.lines(text, known, is_short=is_short)


READERS: Mapping[Way, Reader] = {
    Way("userspace", "nftables"): _userspace_nft,
    Way("userspace", "iptables"): _userspace_iptables,
    Way("iptables", "iptables"): _iptables,
    Way("nftables", "nftables"): _nftables,
    Way("ipvs", "ipvsadm"): _ipvs,
}


def ways(mode: str, rules: str) -> list[Way]:
    """Return the ways of *mode*, "all" for every one; *rules* is the language of userspace mode."""
    language = "iptables" if rules == "iptables" else "nftables"
    return [
        way
        for way in READERS
        if mode == "all" or (way.mode == mode and (mode != "userspace" or way.language == language))
    ]


def explained(way: Way, text: str, known: Known, *, is_short: bool) -> Explained:
    """Return *text*, which was rendered for *way*, with what its lines do. *is_short*: without what nobody needs."""
    return Explained(way, tuple(READERS[way](text, known, is_short)))
