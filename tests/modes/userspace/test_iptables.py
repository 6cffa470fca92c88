"""Our iptables-restore text: as written, as the kernel loads it, and that rules of other programs stay."""

from __future__ import annotations

import random
import re

import pytest

from tests.modes.redirect_cases import (
    ANY4,
    CASES,
    EVERYTHING,
    LONG_NAMES,
    LONGEST,
    LONGEST_WITH_PORT,
    NOTHING,
    TCP,
    Redirects,
    any_redirects,
    assert_golden,
    name,
    redirects,
)
from userspace_proxy.lab import Host, Lab
from userspace_proxy.model.endpoint import Family
from userspace_proxy.modes.userspace import iptables

# What a node may have of others, with all that could be taken for ours.
FOREIGN = """\
*nat
:OTHER-CHAIN - [0:0]
:USERSPACE-PROXY-OF-OTHERS - [0:0]
-A PREROUTING -j OTHER-CHAIN
-A OUTPUT -m comment --comment "before USERSPACE-PROXY looks" -j OTHER-CHAIN
-A OTHER-CHAIN -p tcp -m tcp --dport 80 -m comment --comment "USERSPACE-PROXY" -j REDIRECT --to-ports 81
-A USERSPACE-PROXY-OF-OTHERS -j RETURN
COMMIT
*filter
-A INPUT -i lo -j ACCEPT
COMMIT
"""


@pytest.fixture(params=[(4, "iptables"), (6, "ip6tables")], ids=["ipv4", "ipv6"])
def family(request: pytest.FixtureRequest) -> tuple[Family, str]:
    chosen: tuple[Family, str] = request.param
    return chosen


class Tables:
    """The rules of one family on a host, by one variant of iptables."""

    def __init__(self, host: Host, family: Family, prefix: str) -> None:
        self._host, self._family, self._prefix = host, family, prefix

    def saved(self, *options: str) -> str:
        return self._host.run(f"{self._prefix}-save", *options).stdout

    def restore(self, script: str, *options: str) -> None:
        command = (f"{self._prefix}-restore", "--noflush", *options)
        done = self._host.run(*command, stdin=script, check=False)
        assert done.returncode == 0, f"{done.stderr}\n{script}"

    def load(self, wanted: Redirects) -> None:
        self.restore(wanted.iptables(self._family, self.saved()))

    def remove(self) -> None:
        if script := iptables.removal(self.saved()):
            self.restore(script)

    def rules(self, *tables: str) -> list[str]:
        options = [option for table in tables for option in ("-t", table)]
        return [line for line in self.saved(*options).splitlines() if line.startswith("-A")]

    def skeleton(self) -> list[str]:
        """Return all chains and rules, without counters and comments of the tool."""
        return [re.sub(r" \[.*", "", line) for line in self.saved().splitlines() if not line.startswith("#")]


@pytest.fixture
def tables(host: Host, family: tuple[Family, str]) -> Tables:
    tables = Tables(host, *family)
    tables.remove()
    return tables


# ---- the text


@pytest.mark.parametrize("case", CASES)
def test_the_rules_read_as_written_down(case: str, family: tuple[Family, str]) -> None:
    version, prefix = family

    assert_golden(f"{prefix}-{case}.rules", CASES[case].iptables(version, ""))


def test_the_removal_reads_as_written_down() -> None:
    saved = "\n".join(
        (
            "*filter",
            ":INPUT ACCEPT [0:0]",
            ":USERSPACE-PROXY-GUARD - [0:0]",
            "-A INPUT -m conntrack --ctstate NEW -j USERSPACE-PROXY-GUARD",
            "-A USERSPACE-PROXY-GUARD -m conntrack --ctstate DNAT -j RETURN",
            "COMMIT",
            "*nat",
            ":USERSPACE-PROXY - [0:0]",
            "-A PREROUTING -j USERSPACE-PROXY",
            "-A OUTPUT -j USERSPACE-PROXY",
            "-A USERSPACE-PROXY -d 10.96.0.1/32 -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 10001",
            "COMMIT",
        )
    )

    assert_golden("iptables-removal.rules", iptables.removal(saved))


def test_where_nothing_is_ours_there_is_nothing_to_remove() -> None:
    assert iptables.removal("") == ""
    assert iptables.removal(FOREIGN) == ""


@pytest.mark.parametrize(
    ("line", "is_ours"),
    [
        (":USERSPACE-PROXY - [0:0]", True),
        (":USERSPACE-PROXY-GUARD - [0:0]", True),
        ("-A PREROUTING -j USERSPACE-PROXY", True),
        ("-A INPUT -m conntrack --ctstate NEW -j USERSPACE-PROXY-GUARD", True),
        ("-A THEIRS -s 10.0.0.0/8 -g USERSPACE-PROXY", True),
        ("-A USERSPACE-PROXY -d 10.96.0.1/32 -p tcp -j REDIRECT --to-ports 10001", True),
        (":USERSPACE-PROXY-OF-OTHERS - [0:0]", False),
        ("-A PREROUTING -j USERSPACE-PROXY-OF-OTHERS", False),
        ('-A INPUT -m comment --comment "see USERSPACE-PROXY docs" -j ACCEPT', False),
        ('-A INPUT -m comment --comment "-j USERSPACE-PROXY"', False),
        ("-A INPUT -m comment --comment USERSPACE-PROXY -j ACCEPT", False),
        ("# USERSPACE-PROXY", False),
        ("*nat", False),
        ("", False),
    ],
)
def test_our_rules_are_recognised_by_chains_and_targets_not_by_comments(line: str, is_ours: bool) -> None:
    assert bool(iptables.removal(f"*nat\n{line}\n")) is is_ours


def test_node_port_rules_come_after_the_rules_of_addresses() -> None:
    """Otherwise a node port would capture packets to the same port of a cluster IP that is an address of this node."""
    both = redirects((ANY4, 80, name("a/node"), 10_001), ("10.96.0.1", 80, name("a/ip"), 10_002))
    script = both.iptables(4, "")

    nat = script[script.index("*nat") :]
    assert nat.index("10.96.0.1") < nat.index("--dst-type LOCAL")


# ---- the kernel


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_lists_what_was_asked_for(tables: Tables, family: tuple[Family, str], case: str) -> None:
    script = CASES[case].iptables(family[0], tables.saved())
    tables.restore(script, "--test")

    tables.restore(script)

    for chain in (iptables.CHAIN, iptables.NODE_PORTS, iptables.DROP, iptables.RANGES, iptables.GUARD):
        asked = [line for line in script.splitlines() if line.startswith(f"-A {chain} ")]
        assert [line for line in tables.rules() if line.startswith(f"-A {chain} ")] == asked


def test_rules_can_be_found_by_the_longest_legal_names(tables: Tables) -> None:
    tables.load(LONG_NAMES)

    saved = tables.saved()

    assert str(LONGEST) in saved
    assert str(LONGEST_WITH_PORT) in saved


def test_loading_again_adds_nothing(tables: Tables) -> None:
    tables.load(EVERYTHING)
    before = tables.skeleton()

    tables.load(EVERYTHING)

    assert tables.skeleton() == before


def test_the_result_does_not_depend_on_the_rules_loaded_before(tables: Tables) -> None:
    chance = random.Random(2)
    for _ in range(3):
        wanted = any_redirects(chance)
        tables.load(any_redirects(chance))
        tables.load(wanted)
        after_another = tables.skeleton()
        tables.remove()
        tables.load(wanted)

        assert after_another == tables.skeleton()


def test_our_jumps_are_put_first_again_and_each_is_there_once(tables: Tables) -> None:
    tables.load(EVERYTHING)
    tables.restore(
        "*nat\n-I PREROUTING 1 -p tcp -m tcp --dport 1 -j ACCEPT\n-A PREROUTING -j USERSPACE-PROXY\nCOMMIT\n"
        "*filter\n-I INPUT 1 -i lo -j ACCEPT\nCOMMIT\n"
    )

    tables.load(EVERYTHING)

    chains = {"PREROUTING": "nat", "INPUT": "filter"}
    at = {chain: [r for r in tables.rules(table) if r.startswith(f"-A {chain} ")] for chain, table in chains.items()}
    assert [rule.endswith("-j USERSPACE-PROXY") for rule in at["PREROUTING"]] == [True, False]
    assert [rule.endswith("-j USERSPACE-PROXY-GUARD") for rule in at["INPUT"]] == [True, False]
    tables.restore("*nat\n-F PREROUTING\nCOMMIT\n*filter\n-F INPUT\nCOMMIT\n")


def test_a_flushed_chain_of_others_costs_us_only_our_jump(tables: Tables) -> None:
    tables.load(EVERYTHING)
    before = tables.skeleton()
    tables.restore("*nat\n-F PREROUTING\n-F OUTPUT\nCOMMIT\n")

    tables.load(EVERYTHING)

    assert tables.skeleton() == before


def test_removal_leaves_everything_that_is_not_ours(tables: Tables) -> None:
    tables.restore(FOREIGN)
    before = tables.skeleton()
    tables.load(EVERYTHING)
    tables.restore("*nat\n-A OTHER-CHAIN -p tcp -m tcp --dport 99 -j USERSPACE-PROXY\nCOMMIT\n")

    tables.remove()

    assert tables.skeleton() == before
    tables.restore("*nat\n-F\n-X OTHER-CHAIN\n-X USERSPACE-PROXY-OF-OTHERS\nCOMMIT\n*filter\n-F INPUT\nCOMMIT\n")


def test_our_rules_in_a_listing_do_not_depend_on_rules_of_other_programs(tables: Tables) -> None:
    tables.load(EVERYTHING)
    before = iptables.ours(tables.saved())

    tables.restore("*nat\n-A POSTROUTING -p tcp -m tcp --dport 1 -j ACCEPT\nCOMMIT\n")
    assert iptables.ours(tables.saved()) == before

    tables.restore("*nat\n-D USERSPACE-PROXY 1\n-F POSTROUTING\nCOMMIT\n")
    assert iptables.ours(tables.saved()) != before


def test_a_refused_load_leaves_what_was_there(host: Host, tables: Tables, family: tuple[Family, str]) -> None:
    tables.load(EVERYTHING)
    before = tables.skeleton()
    script = NOTHING.iptables(family[0], tables.saved()).replace("-j RETURN", "-j NO-SUCH-CHAIN")

    assert host.run(f"{family[1]}-restore", "--noflush", stdin=script, check=False).returncode != 0

    assert [line for line in tables.skeleton() if "GUARD" in line] == [line for line in before if "GUARD" in line]


def test_a_hundred_ports_are_guarded_though_one_match_takes_fifteen(tables: Tables) -> None:
    rows = [(f"10.96.0.{n}", 80, name(f"ns/s{n}", TCP), 10_000 + n) for n in range(100)]

    tables.load(redirects(*rows))

    listed = [re.search(r"--dports (\S+)", rule) for rule in tables.rules()]
    ports = [int(port) for found in listed if found for port in found[1].split(",")]
    assert sorted(ports) == [10_000 + n for n in range(100)]


@pytest.mark.parametrize("prefix", ["iptables-legacy", "ip6tables-legacy"])
def test_the_older_iptables_takes_the_same_text(lab: Lab, prefix: str) -> None:
    host = lab.hosts.get("legacy") or lab.add("legacy")
    if host.run(f"{prefix}-save", check=False).returncode:
        pytest.skip("this kernel has no legacy iptables")
    tables = Tables(host, 4 if prefix.startswith("iptables") else 6, prefix)

    for wanted in CASES.values():
        tables.load(wanted)
    tables.remove()

    assert tables.rules() == []
