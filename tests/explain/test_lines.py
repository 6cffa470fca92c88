"""Every rendered line is explained, and an unknown line is an error."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from tests.explain.shop import WAYS
from tests.modes.redirect_cases import CASES, UDP, Redirects, any_redirects, name
from tests.modes.translation_cases import DNS, EVERYTHING, HERE, NEAR4, PODS, any_translation, by_name, translation
from userspace_proxy.config.settings import Settings
from userspace_proxy.explain import rendering
from userspace_proxy.explain.lines import Explained, Line
from userspace_proxy.explain.rendering import explained, select_service_ports
from userspace_proxy.model.endpoint import FAMILIES
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.redirects import PodDetector
from userspace_proxy.model.service import ServicePort
from userspace_proxy.modes.iptables import loader as kube_kernel
from userspace_proxy.modes.iptables import tables
from userspace_proxy.modes.iptables.chains import ChainOptions, node_rules, service_rules
from userspace_proxy.modes.kernel_rules import NodeFacts, Translation
from userspace_proxy.modes.portal_names import PortalNames
from userspace_proxy.modes.rule_line import text_of
from userspace_proxy.modes.slots.slot_table import SlotTable
from userspace_proxy.modes.userspace import iptables
from userspace_proxy.modes.userspace.nft import RedirectTable

USERSPACE_NFT, USERSPACE_IPTABLES, IPTABLES, NFTABLES = (
    next(way for way in WAYS if str(way) == title)
    for title in ("userspace (nftables)", "userspace (iptables)", "iptables", "nftables")
)
LESSONS = Path(__file__).parents[2] / "examples"
# The others say how to run it, and have no Service.
EXAMPLES = sorted({file.parent for file in LESSONS.glob("*/*.yaml")} - {LESSONS / "kubernetes", LESSONS / "grafana"})
SERVICE_PORTS = (
    ServicePort(name("shop/dns:dns", UDP), 53, ("10.96.0.10",)),
    ServicePort(name("shop/dns:dns-tcp"), 53, ("10.96.0.10",)),
    ServicePort(name("shop/web:http"), 80, ("10.96.0.1",)),
    ServicePort(name("office/web"), 80, ("10.96.0.3",)),
)
# Of a set or chain, and its end; what is between them says what it is for.
BRACKETS = {"}", "elements = {"}


def unexplained(lines: Iterable[Line]) -> list[str]:
    return [line.text for line in lines if not line.explanation and line.text.strip() not in BRACKETS]


def of_redirects(redirects: Redirects, *, is_short: bool = False) -> list[Explained]:
    known, made = PortalNames(()), list(redirects.translations.values())
    return [
        explained(USERSPACE_NFT, RedirectTable().rules(redirects.facts, made), known, is_short=is_short),
        explained(USERSPACE_IPTABLES, iptables.rules(made, redirects.facts), known, is_short=is_short),
    ]


def of_translations(
    translations: Mapping[ServicePortName, Translation], facts: NodeFacts, *, is_short: bool = False
) -> list[Explained]:
    known = PortalNames(made.service_port for made in translations.values())
    chains = kube_kernel.rules(translations, facts, ChainOptions(facts.pods))
    return [
        explained(IPTABLES, chains, known, is_short=is_short),
        explained(NFTABLES, SlotTable().rules(facts, translations.values()), known, is_short=is_short),
    ]


@pytest.mark.parametrize("case", CASES)
def test_every_line_of_userspace_mode_is_explained_and_unchanged(case: str) -> None:
    in_nft, in_iptables = of_redirects(CASES[case])

    assert unexplained([*in_nft.lines, *in_iptables.lines]) == []
    assert [line.text for line in in_nft.lines] == CASES[case].nft().splitlines()
    text = "\n".join(line.text for line in in_iptables.lines)
    for family, part in zip(FAMILIES, re.split(r"^# .*\n", text, flags=re.MULTILINE)[1:], strict=True):
        assert part.splitlines() == CASES[case].iptables(family, "").splitlines()


@pytest.mark.parametrize(
    "facts",
    [
        NodeFacts(),
        NodeFacts(HERE, PODS, ("10.96.0.0/16", "fd00:96::/64"), ("192.168.50.1/32", "10.0.0.0/8", "fd00:50::/64")),
        NodeFacts(HERE, PodDetector(interface="cali*")),
        NodeFacts(HERE, PodDetector(cidrs=("10.244.0.0/24", "10.245.0.0/24"))),
    ],
)
def test_every_line_of_kernel_modes_is_explained_and_unchanged(facts: NodeFacts) -> None:
    chains, table = of_translations(EVERYTHING, facts)

    assert unexplained([*chains.lines, *table.lines]) == []
    whole = kube_kernel.rules(EVERYTHING, facts, ChainOptions(facts.pods)).families
    for family, (_, sections) in zip(FAMILIES, whole, strict=True):
        how = ChainOptions(facts.pods, node_ports_on=facts.node_ports_on)
        services = {name: service_rules(made, family, how) for name, made in EVERYTHING.items()}
        loaded = tables.whole(tables.Tables(node_rules(family, how), services), {})
        assert "".join(text_of(section.lines()) for section in sections) == loaded
    assert [line.text for line in table.lines] == SlotTable().rules(facts, EVERYTHING.values()).text().splitlines()


@pytest.mark.parametrize("seed", range(40))
def test_every_line_is_explained_for_any_services(seed: int) -> None:
    chance = random.Random(seed)
    services = by_name(any_translation(chance, number) for number in range(5))
    pods = chance.choice((None, PODS, PodDetector(interface="veth*")))

    found = [*of_redirects(any_redirects(chance)), *of_translations(services, NodeFacts(HERE, pods))]

    assert [unexplained(mode.lines) for mode in found] == [[], [], [], []]


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda folder: folder.name)
def test_every_line_of_every_lesson_is_explained_in_every_mode(folder: Path) -> None:
    found, _ = rendering.explain(Settings(paths=(str(folder),), proxy_mode="all"))

    assert [mode.rendered for mode in found][:4] == [USERSPACE_NFT, USERSPACE_IPTABLES, IPTABLES, NFTABLES]
    assert [unexplained(mode.lines) for mode in found] == [[] for _ in found]


def test_a_line_names_its_service() -> None:
    chains, table = of_translations(EVERYTHING, NodeFacts(HERE, PODS))
    owners = set(map(str, EVERYTHING))

    for mode in (chains, table):
        assert {line.service for line in mode.lines} == {"", *owners}
    assert {line.service for line in chains.lines if "DNAT --to" in line.text} <= owners
    assert {line.service for line in table.lines if " . 0 : " in line.text} <= owners


def test_probabilities_are_explained_as_fractions() -> None:
    lines = rendering.explain(Settings(paths=(str(LESSONS / "cluster-ip"),), proxy_mode="iptables"))[0][0].lines

    said = [line.explanation for line in lines if "10.96.0.11" not in line.text and line.text.startswith("-A KUBE-SVC")]

    assert said == [
        "One of 3 endpoints at random, the first: 10.244.0.2:8080 with probability 1/3.",
        "The next: 10.244.0.3:8080 with probability 1/2 of the packets that are left, 1 in 3 of all.",
        "One of 3 endpoints at random, the last: all packets that are left go to 10.244.0.4:8080, 1 in 3.",
    ]


# ---- one Service only


@pytest.mark.parametrize("seed", range(40))
def test_only_unused_lines_are_omitted(seed: int) -> None:
    chance = random.Random(seed)
    services = by_name(any_translation(chance, number) for number in range(chance.randrange(1, 3)))
    redirects, facts = any_redirects(chance), NodeFacts(HERE, chance.choice((None, PODS)))

    whole = [*of_redirects(redirects), *of_translations(services, facts)]
    short = [*of_redirects(redirects, is_short=True), *of_translations(services, facts, is_short=True)]

    for before, after in zip(whole, short, strict=True):
        assert not Counter(after.lines) - Counter(before.lines)
        gone = Counter(before.lines) - Counter(after.lines)
        # A Service may have chains of its own to which nothing leads in one family.
        assert [
            line.text for line in gone if line.service and not re.match(":|-A KUBE-(SVC|SVL|EXT|FW|SEP)-", line.text)
        ] == []
        names = [line.text.split()[1] for line in after.lines if line.text.startswith(("\tset ", "\tmap ", "\tchain "))]
        looked_up = re.findall(r"(?:@|jump |goto )(\w+)", "\n".join(line.text for line in after.lines))
        assert set(looked_up) <= set(names)


def test_a_service_of_one_family_and_protocol_is_shown_without_the_others() -> None:
    translations = by_name([translation(replace(DNS, cluster_ips=("10.96.0.10",)), NEAR4)])

    for mode in of_translations(translations, NodeFacts(HERE, PODS, ("10.96.0.0/16",)), is_short=True):
        text = "\n".join(line.text for line in mode.lines)
        assert not re.search(r"ip6|tcp dport|@\w+_tcp_|KUBE-NODEPORTS|LOCALNET|@pins", text)
        assert "10.244.0.2" in text


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("dns", {"shop/dns:dns", "shop/dns:dns-tcp"}),
        ("shop/dns:dns", {"shop/dns:dns"}),
        ("dns:53", {"shop/dns:dns", "shop/dns:dns-tcp"}),
        ("office/web", {"office/web"}),
        ("office/web:80", {"office/web"}),
    ],
)
def test_a_service_is_selected_by_name_namespace_and_port(wanted: str, found: set[str]) -> None:
    assert set(map(str, select_service_ports(wanted, SERVICE_PORTS))) == found


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ("db", "no Service is called 'db'; there is: shop/dns:dns, shop/dns:dns-tcp, shop/web:http, office/web"),
        ("shop/web:81", "no Service is called 'shop/web:81'"),
        ("web", "'web' may be any of office/web, shop/web"),
    ],
)
def test_an_unknown_or_ambiguous_service_is_refused(wanted: str, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        select_service_ports(wanted, SERVICE_PORTS)
