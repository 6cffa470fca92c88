"""kube-proxy's chains: names, texts and owners, and that the kernel holds them as desired."""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.modes.redirect_cases import TCP, UDP, assert_golden, name
from tests.modes.translation_cases import (
    ALL,
    EVERYTHING,
    FAR4,
    HERE,
    LOCAL,
    NEAR4,
    PODS,
    WEB,
    any_translation,
    by_name,
    translation,
)
from userspace_proxy.errors import SyncError
from userspace_proxy.lab import Host, Lab
from userspace_proxy.model.endpoint import FAMILIES, Endpoint, Family
from userspace_proxy.model.names import L4Protocol, ServicePortName
from userspace_proxy.model.redirects import PodDetector
from userspace_proxy.model.service import node_portal
from userspace_proxy.modes.iptables import tables as kube_tables
from userspace_proxy.modes.iptables.chains import (
    MARK_MASQ,
    NODE_PORTS,
    SERVICES,
    ChainOptions,
    chain_hash,
    node_rules,
    probability,
    service_rules,
)
from userspace_proxy.modes.iptables.loader import IptablesTables
from userspace_proxy.modes.iptables.tables import Tables
from userspace_proxy.modes.kernel_rules import NodeFacts, RuleUpdate, Translation
from userspace_proxy.modes.xtables_script import ChainKey, Saved, read
from userspace_proxy.netfilter import xtables

FACTS = NodeFacts(HERE, PODS)
HOW = ChainOptions(PODS)
CASES = {
    "everything": HOW,
    "by-interface": ChainOptions(
        PodDetector(interface="cali*"),
        node_ports_on=("192.168.50.1/32", "10.0.0.0/8", "fd00:50::/64"),
        localhost_node_ports=False,
        masquerade_bit=3,
        random_fully=False,
        names_endpoints=False,
    ),
}
# What a kubelet of before 1.25 and others have at a node; all of it is theirs.
KUBELET = """\
*nat
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-MARK-DROP - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-POSTROUTING - [0:0]
:CNI-HOSTPORT-SETMARK - [0:0]
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-MARK-DROP -j MARK --set-xmark 0x8000/0x8000
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully
-A CNI-HOSTPORT-SETMARK -m comment --comment "not KUBE-SERVICES" -j KUBE-MARK-MASQ
COMMIT
*filter
:KUBE-FIREWALL - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-NODEPORTS - [0:0]
-A INPUT -j KUBE-FIREWALL
-A KUBE-FIREWALL -m mark --mark 0x8000/0x8000 -j DROP
COMMIT
"""


def tables_of(translations: dict[ServicePortName, Translation], family: Family = 4, how: ChainOptions = HOW) -> Tables:
    services = {known: service_rules(made, family, how) for known, made in translations.items()}
    return Tables(node_rules(family, how), services)


# ---- names and texts


@pytest.mark.parametrize(
    ("service_port", "protocol", "expected"),
    [
        # as they are seen in clusters and tutorials
        ("default/kubernetes:https", TCP, "NPX46M4PTMTKRN6Y"),
        ("kube-system/kube-dns:dns", UDP, "TCOU7JCQXEZGVUNU"),
        ("kube-system/kube-dns:dns-tcp", TCP, "ERIFXISQEP7F7OF4"),
        ("kube-system/kube-dns:metrics", TCP, "JD5MR3NA4I4DYORP"),
        ("ns1/svc1", TCP, "AQI2S6QIMU7PVVRP"),
    ],
)
def test_chains_have_the_names_that_kube_proxy_gives_them(
    service_port: str, protocol: L4Protocol, expected: str
) -> None:
    assert chain_hash(name(service_port, protocol)) == expected


@pytest.mark.parametrize(
    ("service_port", "ip", "expected"),
    [
        ("ns1/svc1:p80", "10.180.0.1", "SXIVWICOYRO3J4NJ"),
        ("ns1/svc1", "10.0.1.1", "3JOIVZTXZZRGORX4"),
        ("ns1/svc1", "10.0.1.5", "EQCHZ7S2PJ72OHAY"),
    ],
)
def test_chains_of_endpoints_have_kube_proxys_names(service_port: str, ip: str, expected: str) -> None:
    assert chain_hash(name(service_port), Endpoint(ip, 80)) == expected


@pytest.mark.parametrize(("of", "expected"), [(2, "0.50000000000"), (3, "0.33333333349"), (7, "0.14285714272")])
def test_a_chance_reads_as_iptables_save_prints_it(of: int, expected: str) -> None:
    assert probability(of) == expected


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", [4, 6])
def test_the_rules_read_as_written_down(case: str, family: Family) -> None:
    text = kube_tables.whole(tables_of(EVERYTHING, family, CASES[case]), {})

    assert_golden(f"kube-{case}-ipv{family}.rules", text)


def test_masquerade_rules_depend_on_the_pod_detector() -> None:
    svc = ChainKey("nat", f"KUBE-SVC-{chain_hash(WEB.name)}")

    def masqueraded(made: Translation, how: ChainOptions) -> list[str]:
        return [rule for rule in service_rules(made, 4, how)[svc] if rule.endswith(MARK_MASQ.name)]

    plain = translation(replace(WEB, load_balancer_ips=(), cluster_ips=WEB.cluster_ips[:1]), NEAR4)
    all_replaced = replace(plain, routes=tuple(r._replace(to=r.to._replace(transparent=False)) for r in plain.routes))  # type: ignore[union-attr]
    here = '-d 10.96.0.1/32 -p tcp -m comment --comment "shop/web:http cluster IP" -m tcp --dport 80'
    two = ChainOptions(PodDetector(cidrs=("10.244.0.0/24", "10.245.0.0/24")))

    assert masqueraded(translation(WEB, NEAR4, detects_pods=False), ChainOptions()) == []
    assert masqueraded(plain, HOW) == [f"! -s 10.244.0.0/24 {here} -j KUBE-MARK-MASQ"]
    assert masqueraded(all_replaced, HOW) == [f"{here} -j KUBE-MARK-MASQ"]
    assert masqueraded(plain, two) == [f"{here} -j KUBE-MARK-MASQ"]
    assert f"-s 10.245.0.0/24 {here} -j MARK --set-xmark 0x0/0x4000" in service_rules(plain, 4, two)[svc]


def test_source_ranges_apply_to_a_load_balancer_ip_that_is_also_an_external_ip() -> None:
    ip = "203.0.113.5"
    made = replace(WEB, node_port=0, external_ips=(ip,), load_balancer_ips=(ip,), source_ranges=("192.168.0.0/16",))

    rules = service_rules(translation(made, NEAR4), 4, HOW)[SERVICES]

    assert [rule.rpartition("-j ")[2][:8] for rule in rules if f"-d {ip}/" in rule] == ["KUBE-FW-"]


def test_a_portal_that_another_has_is_left_to_it() -> None:
    made = translation(LOCAL, *ALL)
    node_port = node_portal(4, LOCAL.node_port, TCP)
    rules = service_rules(replace(made, routes=tuple(r for r in made.routes if r.portal != node_port)), 4, HOW)

    assert NODE_PORTS in service_rules(made, 4, HOW)
    assert NODE_PORTS not in rules
    assert len(rules[SERVICES]) == 3


# ---- in the kernel


class Loader:
    """The rules of one family on a host, by one variant of iptables."""

    def __init__(self, host: Host, family: Family, prefix: str) -> None:
        self.host, self.family, self.prefix = host, family, prefix

    def text(self) -> str:
        return self.host.run(f"{self.prefix}-save").stdout

    def saved(self) -> Saved:
        return read(self.text())

    def restore(self, script: str) -> None:
        if script:
            done = self.host.run(f"{self.prefix}-restore", "--noflush", stdin=script, check=False)
            assert done.returncode == 0, f"{done.stderr}\n{script}"

    def remove(self) -> None:
        self.restore(kube_tables.removal(self.saved()))

    def skeleton(self) -> list[str]:
        """Return all chains and rules, without counters, comments of the tool, and the tables' own chains."""
        lines = [re.sub(r" \[.*", "", line) for line in self.text().splitlines()]
        return [line for line in lines if not re.match(r"#|:\w+ ACCEPT|\*|COMMIT", line)]


VARIANTS = [(4, "iptables"), (6, "ip6tables"), (4, "iptables-legacy"), (6, "ip6tables-legacy")]


@pytest.fixture(params=VARIANTS, ids=[prefix for _, prefix in VARIANTS])
def loader(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Loader]:
    family, prefix = request.param
    host = lab.hosts.get(prefix) or lab.add(prefix)
    if host.run(f"{prefix}-save", check=False).returncode:
        pytest.skip("this kernel has no legacy iptables")
    loader = Loader(host, family, prefix)
    yield loader
    for table in kube_tables.TABLES:
        for flag in "FX":
            host.run(prefix, "-t", table, f"-{flag}")


def in_any_order(chains: dict[ChainKey, tuple[str, ...]]) -> dict[ChainKey, tuple[str, ...]]:
    return {chain: tuple(sorted(rules)) for chain, rules in chains.items()}


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_shows_them_word_by_word(loader: Loader, case: str) -> None:
    wanted = tables_of(EVERYTHING, loader.family, CASES[case])

    loader.restore(kube_tables.whole(wanted, loader.saved()))

    saved = loader.saved()
    assert {chain: saved[chain] for chain in wanted.chains()} == wanted.chains()
    assert kube_tables.is_loaded(wanted, saved)
    assert kube_tables.whole(wanted, saved) == ""


def test_chains_in_several_transactions_equal_those_in_one(loader: Loader) -> None:
    wanted = tables_of(EVERYTHING, loader.family)

    loader.restore(kube_tables.whole(wanted, loader.saved(), chains_at_once=2))
    assert kube_tables.whole(wanted, loader.saved()) == ""

    loader.restore(kube_tables.removal(loader.saved(), chains_at_once=2))
    assert loader.skeleton() == []


def test_any_change_ends_as_a_load_of_all_does(loader: Loader) -> None:
    chance = random.Random(loader.prefix)
    held = by_name(any_translation(chance, number) for number in range(1, 6))
    before = tables_of(held, loader.family)
    loader.restore(kube_tables.whole(before, loader.saved()))
    for _ in range(25):
        wanted = dict(held)
        for number in chance.sample(range(1, 9), 2):
            for known in [known for known in wanted if known.service.name == f"s{number}"]:
                del wanted[known]
            if chance.random() < 0.7:
                wanted |= by_name([any_translation(chance, number)])
        how = HOW if chance.random() < 0.9 else replace(HOW, node_ports_on=("10.0.0.0/8", "fd00::/16"))
        after = tables_of(wanted, loader.family, how)

        loader.restore(kube_tables.change(before, after, {*held, *wanted}))

        saved = loader.saved()
        assert kube_tables.is_loaded(after, saved)
        chains = {c: rules for c, rules in saved.items() if kube_tables.is_ours(c) and c.name != kube_tables.MARK}
        assert in_any_order(chains) == in_any_order(after.chains())
        held, before = wanted, after


def test_a_repair_loads_only_the_changed_chains(loader: Loader) -> None:
    wanted = tables_of(EVERYTHING, loader.family)
    loader.restore(kube_tables.whole(wanted, loader.saved()))
    sep = next(chain for chain in wanted.chains() if chain.name.startswith("KUBE-SEP-"))
    loader.restore(f"*nat\n:{sep.name} - [0:0]\n:KUBE-SEP-STRANGER - [0:0]\n-F PREROUTING\nCOMMIT\n")
    assert not kube_tables.is_loaded(wanted, loader.saved())

    script = kube_tables.whole(wanted, loader.saved())
    loader.restore(script)

    assert script.count("\n:") == 2
    assert kube_tables.is_loaded(wanted, loader.saved())
    assert "KUBE-SEP-STRANGER" not in loader.text()


# ---- whose they are


def test_removal_restores_the_chains_of_a_kubelet_and_of_other_programs(loader: Loader) -> None:
    loader.restore(KUBELET)
    before = loader.skeleton()
    wanted = tables_of(EVERYTHING, loader.family)
    assert kube_tables.foreign(loader.saved(), wanted.node) == ""
    loader.restore(kube_tables.whole(wanted, loader.saved()))
    assert kube_tables.is_loaded(wanted, loader.saved())

    loader.remove()

    assert loader.skeleton() == before
    loader.remove()
    assert loader.skeleton() == before


def test_a_chain_to_which_other_programs_jump_stays(loader: Loader) -> None:
    loader.restore(kube_tables.whole(tables_of(EVERYTHING, loader.family), loader.saved()))
    loader.restore("*nat\n:CNI-SETMARK - [0:0]\n-A CNI-SETMARK -j KUBE-MARK-MASQ\nCOMMIT\n")

    loader.remove()

    assert [line for line in loader.skeleton() if "KUBE-" in line] == [
        ":KUBE-MARK-MASQ -",
        "-A CNI-SETMARK -j KUBE-MARK-MASQ",
        "-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000",
    ]


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ("*nat\n:KUBE-SERVICES - [0:0]\n-A KUBE-SERVICES -j RETURN\nCOMMIT\n", "kube-proxy --cleanup"),
        ("*nat\n:KUBE-SVC-NPX46M4PTMTKRN6Y - [0:0]\nCOMMIT\n", "KUBE-SVC-NPX46M4PTMTKRN6Y in the table nat"),
        ("*filter\n:KUBE-SERVICES - [0:0]\n-A KUBE-SERVICES -j RETURN\nCOMMIT\n", "--proxy-mode nftables"),
        ("*nat\n:KUBE-MARK-MASQ - [0:0]\n-A KUBE-MARK-MASQ -j MARK --set-mark 1\nCOMMIT\n", "KUBE-MARK-MASQ in the"),
    ],
)
def test_chains_of_another_kube_proxy_are_refused_and_never_removed(loader: Loader, theirs: str, said: str) -> None:
    loader.restore(theirs)
    before = loader.skeleton()

    assert said in kube_tables.foreign(loader.saved(), tables_of(EVERYTHING, loader.family).node)

    loader.remove()
    assert loader.skeleton() == before


def test_chains_left_by_kube_proxys_cleanup_are_no_obstacle(loader: Loader) -> None:
    loader.restore(
        "*nat\n:KUBE-MARK-MASQ - [0:0]\n:KUBE-PROXY-CANARY - [0:0]\n"
        "-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000\nCOMMIT\n"
        "*filter\n:KUBE-PROXY-FIREWALL - [0:0]\n-A KUBE-PROXY-FIREWALL -p tcp -j DROP\nCOMMIT\n"
    )
    wanted = tables_of(EVERYTHING, loader.family)

    assert kube_tables.foreign(loader.saved(), wanted.node) == ""
    loader.restore(kube_tables.whole(wanted, loader.saved()))

    assert kube_tables.is_loaded(wanted, loader.saved())


# ---- IptablesTables


@pytest.fixture
def clean(host: Host) -> Iterator[Host]:
    yield host
    host.run("nft", "flush", "ruleset")


async def test_rules_are_intact_until_another_program_changes_them_and_again_after_a_reload(clean: Host) -> None:
    tables = IptablesTables()
    touched: list[None] = []
    with clean.inside():
        await tables.load(RuleUpdate(EVERYTHING, set(EVERYTHING), FACTS))
        await tables.watch(lambda: touched.append(None))
        for touch in (
            ("iptables", "-t", "nat", "-F"),
            ("iptables", "-D", "FORWARD", "1"),
            ("ip6tables", "-t", "nat", "-A", "KUBE-MARK-MASQ", "-j", "ACCEPT"),
            ("nft", "flush", "ruleset"),
        ):
            assert await tables.is_intact()

            clean.run(*touch)
            tables._watch._notices._read()  # type: ignore[union-attr]

            assert touched, touch
            assert not await tables.is_intact(), touch
            await tables.reload()
            touched.clear()
        assert await tables.is_intact()
        tables.unwatch()
        await tables.remove()
        assert "KUBE" not in clean.run("nft", "list", "ruleset").stdout


async def test_rules_of_others_beside_ours_are_no_reason_to_load_again(clean: Host) -> None:
    tables = IptablesTables()
    with clean.inside():
        await tables.load(RuleUpdate(EVERYTHING, set(EVERYTHING), FACTS))
        await tables.watch(lambda: None)
        clean.run("iptables", "-A", "FORWARD", "-p", "tcp", "-j", "ACCEPT")
        clean.run("iptables", "-t", "nat", "-N", "DOCKER")
        tables._watch._notices._read()  # type: ignore[union-attr]

        assert await tables.is_intact()
        tables.unwatch()


async def test_only_what_changed_is_loaded(clean: Host) -> None:
    tables = IptablesTables()
    web = by_name([translation(WEB, NEAR4)])
    with clean.inside():
        await tables.load(RuleUpdate(EVERYTHING | web, set(EVERYTHING), FACTS))
        clean.run("iptables", "-t", "nat", "-Z")
        clean.run("iptables", "-t", "nat", "-A", f"KUBE-SVC-{chain_hash(LOCAL.name)}", "-j", "RETURN")
        web = by_name([translation(WEB, NEAR4, FAR4)])

        await tables.load(RuleUpdate(EVERYTHING | web, set(web), FACTS))

        saved = clean.run("iptables-save", "-t", "nat").stdout
    assert f"-A KUBE-SVC-{chain_hash(LOCAL.name)} -j RETURN" in saved, "a chain that did not change was written"
    assert saved.count(f"-A KUBE-SEP-{chain_hash(WEB.name, FAR4)} ") == 2


async def test_a_look_that_fails_leaves_it_unknown_whether_all_is_there(
    clean: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails(_: str) -> str:
        raise SyncError("busy")

    tables = IptablesTables()
    with clean.inside():
        await tables.load(RuleUpdate(EVERYTHING, set(EVERYTHING), FACTS))
        with monkeypatch.context() as broken:
            broken.setattr(xtables, "save", fails)
            with pytest.raises(SyncError, match="busy"):
                await tables.is_intact()

        clean.run("iptables", "-t", "nat", "-F")  # nobody watches: no notice tells of it
        assert not await tables.is_intact()


@pytest.mark.parametrize("family", FAMILIES)
async def test_rules_are_counted_by_table_without_counting_all(clean: Host, family: Family) -> None:
    tables = IptablesTables()
    web, more = by_name([translation(WEB, NEAR4)]), by_name([translation(WEB, *ALL)])
    with clean.inside():
        for wanted in (EVERYTHING, EVERYTHING | web, EVERYTHING | more, web, {}):
            await tables.load(RuleUpdate(wanted, {*EVERYTHING, *web}, FACTS))

            saved = read(clean.run("iptables-save" if family == 4 else "ip6tables-save").stdout)
            mine = {c: rules for c, rules in saved.items() if kube_tables.is_ours(c) and c.name != kube_tables.MARK}
            assert tables.loads[f"IPv{family}"].rules == kube_tables.counts(mine)


async def test_loads_of_everything_and_of_changes_are_counted_apart(clean: Host) -> None:
    tables = IptablesTables()
    web = by_name([translation(WEB, NEAR4)])
    with clean.inside():
        await tables.load(RuleUpdate(EVERYTHING, set(EVERYTHING), FACTS))
        loads = tables.loads["IPv4"]
        assert loads.written["nat"] > 20

        await tables.load(RuleUpdate(EVERYTHING | web, set(web), FACTS))

    assert (loads.whole.count, loads.changes.count, loads.refused) == (1, 1, 0)
    assert loads.written["nat"] < 10, "a change does not write the rules of others"


async def test_a_refused_change_is_made_good_by_the_next_load(clean: Host) -> None:
    tables = IptablesTables()
    with clean.inside():
        await tables.load(RuleUpdate(EVERYTHING, set(EVERYTHING), FACTS))
        bad = by_name([translation(replace(WEB, affinity_timeout_s=-1), *ALL)])

        with pytest.raises(SyncError, match="iptables-restore"):
            await tables.load(RuleUpdate(EVERYTHING | bad, set(bad), FACTS))

        loads = tables.loads["IPv4"]
        assert (loads.refused, loads.refused_changes) == (2, 1), "the change, and then the whole"
        await tables.load(RuleUpdate(EVERYTHING, set(bad), FACTS))
        tables._watch.is_touched = True
        assert await tables.is_intact()


async def test_beside_another_kube_proxy_it_does_not_begin(clean: Host) -> None:
    with clean.inside():
        clean.run("iptables", "-t", "nat", "-N", "KUBE-SVC-NPX46M4PTMTKRN6Y")

        with pytest.raises(SyncError, match="stop it and run `kube-proxy --cleanup`"):
            await IptablesTables().prepare()
        await IptablesTables().remove()

        assert "KUBE-SVC-NPX46M4PTMTKRN6Y" in clean.run("iptables-save").stdout


async def test_a_foreign_jump_to_our_chain_does_not_prevent_a_load(clean: Host) -> None:
    changed = WEB.name
    chain = ChainKey("nat", f"KUBE-SVC-{chain_hash(changed)}")
    rest = {each: made for each, made in EVERYTHING.items() if each != changed}
    with clean.inside():
        tables = IptablesTables()
        await tables.load(RuleUpdate(EVERYTHING, set(EVERYTHING), FACTS))
        clean.run("iptables", "-t", "nat", "-A", "PREROUTING", "-d", "198.51.100.1", "-j", chain.name)

        await tables.load(RuleUpdate(rest, {changed}, FACTS))

        there = read(clean.run("iptables-save").stdout)
        assert there[chain] == ()
        assert kube_tables.is_loaded(tables_of(rest), there)
        await tables.load(RuleUpdate(EVERYTHING, {changed}, FACTS))
        assert read(clean.run("iptables-save").stdout)[chain]


async def test_route_localnet_is_off_again_also_where_a_successor_had_to_load_after_a_flush(clean: Host) -> None:
    with clean.inside():
        clean.run("sysctl", "-w", "net.ipv4.conf.all.route_localnet=0")
        await IptablesTables().load(RuleUpdate(EVERYTHING, set(EVERYTHING), FACTS))
        successor = IptablesTables()
        await successor.load(RuleUpdate(EVERYTHING, set(EVERYTHING), FACTS))
        clean.run("nft", "flush", "ruleset")
        await successor.reload()

        await IptablesTables().remove()

        assert not is_localnet_routed(clean)


def is_localnet_routed(host: Host) -> bool:
    return host.run("sysctl", "-n", "net.ipv4.conf.all.route_localnet").stdout.strip() == "1"


async def test_route_localnet_is_as_it_was_when_all_is_taken_away(clean: Host) -> None:
    with clean.inside():
        for was_on in (False, True):
            clean.run("sysctl", "-w", f"net.ipv4.conf.all.route_localnet={int(was_on)}")
            tables = IptablesTables()
            await tables.prepare()
            assert is_localnet_routed(clean) == was_on, "the node may be another's to serve yet"
            await tables.load(RuleUpdate(EVERYTHING, set(EVERYTHING), FACTS))
            assert is_localnet_routed(clean)

            await IptablesTables().remove()  # as `cleanup` does, after a crash

            assert is_localnet_routed(clean) == was_on


@pytest.fixture
def legacy(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host on which iptables is the older one."""
    host = lab.hosts.get("iptables-legacy") or lab.add("iptables-legacy")
    if host.run("iptables-legacy-save", check=False).returncode:
        pytest.skip("this kernel has no legacy iptables")
    for prefix in ("iptables", "ip6tables"):
        for tool in ("", "-save", "-restore"):
            (tmp_path / f"{prefix}{tool}").symlink_to(shutil.which(f"{prefix}-legacy{tool}") or "")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return host


async def test_the_older_iptables_sends_no_notices_and_is_looked_at(legacy: Host) -> None:
    tables = IptablesTables()
    looked = asyncio.Event()
    with legacy.inside():
        await tables.load(RuleUpdate(EVERYTHING, set(EVERYTHING), FACTS))
        await tables.watch(looked.set)
        assert await tables.is_intact()
        legacy.run("iptables-legacy", "-t", "nat", "-F", "KUBE-SERVICES")

        async with asyncio.timeout(5):
            await looked.wait()

        assert not await tables.is_intact()
        await tables.reload()
        assert await tables.is_intact()
        tables.unwatch()
        await tables.remove()
        assert "KUBE" not in legacy.run("iptables-legacy-save").stdout


async def test_a_kernel_without_ipv6_serves_the_rest(
    clean: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = tmp_path / "ip6tables-save"
    failing.write_text("#!/bin/sh\necho 'ip6tables-save: Address family not supported by protocol' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    tables = IptablesTables()
    with clean.inside():
        await tables.load(RuleUpdate(EVERYTHING, set(EVERYTHING), FACTS))
        assert "KUBE-SVC-" in clean.run("iptables-save").stdout

        await tables.remove()

        assert "KUBE-SVC-" not in clean.run("iptables-save").stdout
