"""Our nftables text: as it is written, as the kernel takes it, and that a change comes to the same as the whole."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest

from tests.modes.redirect_cases import (
    CASES,
    EVERYTHING,
    EVERYTHING_BY_ADDRESS,
    LOCAL,
    LOCAL_BY_INTERFACE,
    LONG_NAMES,
    LONGEST,
    LONGEST_WITH_PORT,
    NOTHING,
    UDP,
    any_redirects,
    assert_golden,
    name,
    redirects,
)
from userspace_proxy.lab import Host, Lab
from userspace_proxy.model.names import NamespacedName, ServicePortName
from userspace_proxy.model.redirects import DROPPED, Redirects
from userspace_proxy.model.routes import Sender
from userspace_proxy.model.service import Portal
from userspace_proxy.modes.userspace import nft
from userspace_proxy.modes.userspace.transparent_replies import bridge_table
from userspace_proxy.netfilter import nft_text
from userspace_proxy.netfilter.nft_text import removal


def load(host: Host, script: str) -> None:
    done = host.run("nft", "-f", "-", stdin=script, check=False)
    assert done.returncode == 0, f"{done.stderr}\n{script}"


def in_force(host: Host) -> Any:
    """Return our table as the kernel lists it, without the parts that depend on the order of loads."""
    listed = json.loads(host.run("nft", "--json", "list", "table", *nft.TABLE.split()).stdout)["nftables"]
    return [_plain(item) for item in listed if "metainfo" not in item]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: _plain(inner) for key, inner in value.items() if key != "handle"}
        if isinstance(kept.get("elem"), list):
            kept["elem"] = sorted(kept["elem"], key=json.dumps)
        return kept
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def elements(host: Host, name: str) -> dict[tuple[Any, ...], int | None]:
    """Return the elements of a map, or those of a set with None behind each."""
    sets = (item[kind] for item in in_force(host) for kind in ("map", "set") if kind in item)
    (found,) = (item for item in sets if item["name"] == name)
    pairs: dict[tuple[Any, ...], int | None] = {}
    for element in found.get("elem", []):
        wrapped, port = element if isinstance(element, list) else (element, None)
        pairs[tuple((wrapped["elem"]["val"] if "elem" in wrapped else wrapped)["concat"])] = port
    return pairs


def key(portal: Portal) -> tuple[Any, ...]:
    port = (portal.protocol.lower(), portal.port)
    return port if portal.is_node_port else (portal.ip, *port)


# ---- the text


@pytest.mark.parametrize("case", CASES)
def test_the_whole_table_reads_as_written_down(case: str) -> None:
    assert_golden(f"nft-{case}.nft", nft.table(CASES[case]))


@pytest.mark.parametrize(
    ("case", "old", "new"),
    [
        ("first", NOTHING, EVERYTHING),
        ("last", EVERYTHING, NOTHING),
        ("capture", EVERYTHING, EVERYTHING_BY_ADDRESS),
        ("policy", EVERYTHING, LOCAL),
        (
            "one-port",
            redirects(("10.96.0.1", 80, name("shop/web"), 10_001), ("10.96.0.2", 80, name("shop/db"), 10_002)),
            redirects(("10.96.0.1", 80, name("shop/web"), 29_999), ("10.96.0.2", 80, name("shop/db"), 10_002)),
        ),
    ],
)
def test_a_change_reads_as_written_down(case: str, old: Redirects, new: Redirects) -> None:
    assert_golden(f"nft-change-{case}.nft", nft.change(old, new))


def test_the_table_for_bridges_reads_as_written_down() -> None:
    assert_golden("nft-bridge.nft", bridge_table())


@pytest.mark.parametrize("case", CASES)
def test_without_a_change_there_is_nothing_to_load(case: str) -> None:
    same = CASES[case]

    assert nft.change(same, replace(same, ports=dict(same.ports))) == ""


def test_a_change_of_one_portal_among_ten_thousand_is_a_few_lines() -> None:
    rows = [(f"10.96.{n // 250}.{n % 250}", 80, name(f"ns/s{n}"), 10_000 + n) for n in range(10_000)]

    script = nft.change(redirects(*rows), redirects(*rows[1:]))

    assert len(script.splitlines()) == 2


# ---- comments


@pytest.mark.parametrize(
    "given",
    [
        name("shop/web:http"),
        name("shop/web"),
        LONGEST,
        LONGEST_WITH_PORT,
        LONGEST._replace(port_name=""),
        ServicePortName(NamespacedName("n", "s" * 63), "p" * 63, UDP),
        ServicePortName(NamespacedName("n" * 63, "s"), "p" * 63, UDP),
        ServicePortName(NamespacedName("n" * 63, "s" * 63), "p", UDP),
    ],
)
def test_a_comment_is_never_too_long_and_always_holds_the_name_of_the_service(given: ServicePortName) -> None:
    comment = nft_text.comment(given)

    assert len(comment.encode()) <= 127
    assert f"/{given.service.name}" in comment
    assert comment.startswith(given.service.namespace[:10])


def test_a_name_that_fits_is_shown_as_it_is() -> None:
    fits = ServicePortName(NamespacedName("n" * 47, "s" * 63), "p" * 15, UDP)

    assert len(str(fits)) == 127
    assert nft_text.comment(fits) == str(fits)
    assert nft_text.comment(fits._replace(port_name="p" * 16)) != str(fits._replace(port_name="p" * 16))


def test_long_names_that_differ_have_comments_that_differ() -> None:
    names = [
        LONGEST,
        LONGEST._replace(service=NamespacedName("n" * 62 + "x", "s" * 63)),
        LONGEST_WITH_PORT,
        LONGEST_WITH_PORT._replace(port_name="p" * 62 + "x"),
    ]

    assert len({nft_text.comment(given) for given in names}) == 4


# ---- the kernel


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_holds_what_was_asked_for(host: Host, case: str) -> None:
    wanted = CASES[case]
    assert host.run("nft", "--check", "-f", "-", stdin=nft.table(wanted), check=False).stderr == ""

    load(host, nft.table(wanted))

    for family in (4, 6):
        for kind, is_node_port in (("service_ips", False), ("node_ports", True)):
            for suffix, ports in (
                ("", wanted.ports),
                ("_for_pods", wanted.exceptions.get(Sender.POD, {})),
                ("_for_node", wanted.exceptions.get(Sender.NODE, {})),
            ):
                asked = {
                    key(portal): port
                    for portal, port in ports.items()
                    if portal.family == family and portal.is_node_port == is_node_port
                }
                dropped = {portal for portal, port in asked.items() if port == DROPPED}
                redirected = {portal: port for portal, port in asked.items() if port != DROPPED}
                assert elements(host, f"{kind}{family}{suffix}") == redirected
                assert set(elements(host, f"dropped_{kind}{family}{suffix}")) == dropped


def test_rules_can_be_found_by_the_longest_legal_names(host: Host) -> None:
    load(host, nft.table(LONG_NAMES))

    listed = host.run("nft", "list", "ruleset").stdout

    assert sum(f"/{'s' * 63}:{'a' * 15}" in line for line in listed.splitlines()) == 2
    assert sum("s" * 63 in line for line in listed.splitlines()) == 5
    assert "n" * 30 in listed


def test_loading_again_changes_nothing(host: Host) -> None:
    load(host, nft.table(EVERYTHING))
    before = in_force(host)

    load(host, nft.table(EVERYTHING))

    assert in_force(host) == before


def test_a_refused_load_leaves_what_was_there(host: Host) -> None:
    load(host, nft.table(EVERYTHING))
    before = in_force(host)

    broken = nft.table(NOTHING) + "add rule inet no_such_table x accept\n"
    assert host.run("nft", "-f", "-", stdin=broken, check=False).returncode != 0

    assert in_force(host) == before


def test_removal_takes_our_table_and_no_other_and_may_be_repeated(host: Host) -> None:
    host.run("nft", "table inet theirs { chain c { }; }")
    load(host, nft.table(EVERYTHING))

    load(host, removal(nft.TABLE))
    load(host, removal(nft.TABLE))

    assert host.run("nft", "list", "tables").stdout.split("\n") == ["table inet theirs", ""]
    host.run("nft", "delete table inet theirs")


def test_random_changes_end_with_the_whole_new_table(lab: Lab, host: Host) -> None:
    """Changes on one host, whole tables on another; both must list the same after each step."""
    other, chance = lab.add("whole"), random.Random(1)
    old = NOTHING
    load(host, nft.table(old))
    for step in range(25):
        new = any_redirects(chance)
        if script := nft.change(old, new):
            load(host, script)
        load(other, nft.table(new))

        assert in_force(host) == in_force(other), f"step {step}: {old} -> {new}"
        old = new


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (EVERYTHING, EVERYTHING_BY_ADDRESS),
        (EVERYTHING, LONG_NAMES),
        (LONG_NAMES, LOCAL),
        (LOCAL, LOCAL_BY_INTERFACE),
        (LOCAL, NOTHING),
    ],
)
def test_a_change_loads_the_same_rules_as_a_full_load(lab: Lab, host: Host, old: Redirects, new: Redirects) -> None:
    load(host, nft.table(new))
    expected = in_force(host)
    load(host, nft.table(old))

    load(host, nft.change(old, new))

    assert in_force(host) == expected


def test_an_address_that_changes_hands_gets_the_comment_of_its_new_service(host: Host) -> None:
    load(host, nft.table(redirects(("10.96.0.1", 80, name("ns/old"), 29_999))))

    load(
        host,
        nft.change(
            redirects(("10.96.0.1", 80, name("ns/old"), 29_999)), redirects(("10.96.0.1", 80, name("ns/new"), 29_999))
        ),
    )

    listed = host.run("nft", "list", "ruleset").stdout
    assert "ns/new" in listed
    assert "ns/old" not in listed
