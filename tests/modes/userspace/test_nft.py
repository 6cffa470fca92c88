"""Our nftables text: as it is written, as the kernel takes it, and that a change has the same result as the whole."""

from __future__ import annotations

import asyncio
import json
import random
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
    Redirects,
    any_redirects,
    assert_golden,
    name,
    redirects,
)
from userspace_proxy.lab import Host, Lab
from userspace_proxy.model.names import NamespacedName, ServicePortName
from userspace_proxy.model.redirects import DROPPED
from userspace_proxy.model.routes import Sender
from userspace_proxy.model.service import Portal
from userspace_proxy.modes.userspace import nft
from userspace_proxy.modes.userspace.loader import NftKernel
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


def held(host: Host) -> Any:
    """Return the sets and maps that have elements, as the kernel lists them."""
    return [item for item in in_force(host) if any(item.get(kind, {}).get("elem") for kind in ("set", "map"))]


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
    assert_golden(f"nft-{case}.nft", CASES[case].nft())


def test_the_table_for_bridges_reads_as_written_down() -> None:
    assert_golden("nft-bridge.nft", bridge_table())


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
    assert host.run("nft", "--check", "-f", "-", stdin=wanted.nft(), check=False).stderr == ""

    load(host, wanted.nft())

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
    load(host, LONG_NAMES.nft())

    listed = host.run("nft", "list", "ruleset").stdout

    assert sum(f"/{'s' * 63}:{'a' * 15}" in line for line in listed.splitlines()) == 2
    assert sum("s" * 63 in line for line in listed.splitlines()) == 5
    assert "n" * 30 in listed


def test_loading_again_changes_nothing(host: Host) -> None:
    load(host, EVERYTHING.nft())
    before = in_force(host)

    load(host, EVERYTHING.nft())

    assert in_force(host) == before


def test_a_refused_load_leaves_what_was_there(host: Host) -> None:
    load(host, EVERYTHING.nft())
    before = in_force(host)

    broken = NOTHING.nft() + "add rule inet no_such_table x accept\n"
    assert host.run("nft", "-f", "-", stdin=broken, check=False).returncode != 0

    assert in_force(host) == before


def test_removal_takes_our_table_and_no_other_and_may_be_repeated(host: Host) -> None:
    host.run("nft", "table inet theirs { chain c { }; }")
    load(host, EVERYTHING.nft())

    load(host, removal(nft.TABLE))
    load(host, removal(nft.TABLE))

    assert host.run("nft", "list", "tables").stdout.split("\n") == ["table inet theirs", ""]
    host.run("nft", "delete table inet theirs")


def test_random_changes_end_with_the_whole_new_table(lab: Lab, host: Host) -> None:
    """Changes on one host, whole tables on another; both must list the same elements after each step."""
    other, chance = lab.add("whole"), random.Random(1)

    async def change_again_and_again() -> None:
        old, kernel = NOTHING, NftKernel()
        await kernel.load(old.update())
        for step in range(25):
            new = any_redirects(chance)
            await kernel.load(new.update(old))
            assert await kernel.is_intact()
            load(other, new.nft())

            assert held(host) == held(other), f"step {step}: {old} -> {new}"
            old = new
        await kernel.remove()

    with host.inside():
        asyncio.run(change_again_and_again())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (EVERYTHING, EVERYTHING_BY_ADDRESS),
        (EVERYTHING, LONG_NAMES),
        (LONG_NAMES, LOCAL),
        (LOCAL, LOCAL_BY_INTERFACE),
        (NOTHING, EVERYTHING),
    ],
)
async def test_a_change_loads_the_same_rules_as_a_full_load(host: Host, old: Redirects, new: Redirects) -> None:
    load(host, new.nft())
    expected = in_force(host)
    load(host, removal(nft.TABLE))
    kernel = NftKernel()
    with host.inside():
        await kernel.load(old.update())

        await kernel.load(new.update(old))

        assert in_force(host) == expected
        await kernel.remove()


async def test_a_table_that_the_nft_tool_wrote_is_taken_over(host: Host) -> None:
    """An instance of an earlier version loads that text."""
    load(host, LOCAL.nft())
    kernel = NftKernel()
    with host.inside():
        await kernel.load(EVERYTHING.update())

        assert await kernel.is_intact()
        listed = held(host)
        await kernel.remove()
    load(host, EVERYTHING.nft())
    assert listed == held(host)


async def test_an_address_that_changes_hands_gets_the_comment_of_its_new_service(host: Host) -> None:
    old, new = (redirects(("10.96.0.1", 80, name(f"ns/{each}"), 29_999)) for each in ("old", "new"))
    kernel = NftKernel()
    with host.inside():
        await kernel.load(old.update())

        await kernel.load(new.update(old))

        listed = host.run("nft", "list", "ruleset").stdout
        await kernel.remove()
    assert "ns/new" in listed
    assert "ns/old" not in listed
