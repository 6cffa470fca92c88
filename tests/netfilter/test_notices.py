"""The kernel's notices of changed rules: which table each message is about."""

from __future__ import annotations

import asyncio
import random
import struct

import pytest

from tests.ends import until
from userspace_proxy.lab import Lab
from userspace_proxy.netfilter.notices import NetworkNotices, RuleWatch, tables_in

NFTABLES, NEWTABLE, NEWSETELEM, NEWGEN = 10, 0, 12, 15
OF_NETFILTER = struct.pack("=BBH", 2, 0, 0)


def attribute(kind: int, value: bytes) -> bytes:
    text = struct.pack("=HH", 4 + len(value), kind) + value
    return text + b"\0" * (-len(text) % 4)


def message(kind: int, body: bytes, subsystem: int = NFTABLES) -> bytes:
    text = (
        struct.pack("=IHHII", 16 + len(OF_NETFILTER) + len(body), subsystem << 8 | kind, 0, 1, 0) + OF_NETFILTER + body
    )
    return text + b"\0" * (-len(text) % 4)


def about(table: str, kind: int = NEWTABLE) -> bytes:
    return message(kind, attribute(1, table.encode() + b"\0") + attribute(2, b"more\0"))


def test_a_message_names_its_table() -> None:
    assert list(tables_in(about("userspace_proxy"))) == [b"userspace_proxy"]


def test_every_message_of_a_datagram_is_read() -> None:
    datagram = about("filter") + about("a", NEWSETELEM) + about("userspace_proxy")

    assert list(tables_in(datagram)) == [b"filter", b"a", b"userspace_proxy"]


@pytest.mark.parametrize(
    "datagram",
    [
        b"",
        message(NEWGEN, attribute(1, b"\0\0\0\1")),
        message(NEWTABLE, attribute(1, b"userspace_proxy\0"), subsystem=1),
        message(NEWTABLE, attribute(2, b"userspace_proxy\0")),
        message(NEWTABLE, b""),
        b"\0" * 40,
    ],
)
def test_a_message_about_no_table_yields_no_name(datagram: bytes) -> None:
    assert list(tables_in(datagram)) == []


def test_a_table_of_a_like_name_is_another_table() -> None:
    assert b"userspace_proxy" not in tables_in(about("userspace_proxy2") + about("userspace"))


def test_a_generation_message_between_others_is_skipped() -> None:
    datagram = about("a") + message(NEWGEN, attribute(1, b"\0\0\0\1")) + about("b")

    assert list(tables_in(datagram)) == [b"a", b"b"]


@pytest.mark.parametrize("cut", range(60))
def test_a_datagram_that_was_cut_off_is_read_as_far_as_it_goes(cut: int) -> None:
    datagram = about("a") + about("userspace_proxy")

    assert list(tables_in(datagram[:cut]))[:1] in ([], [b"a"])


def test_noise_does_no_harm() -> None:
    chance = random.Random(3)
    whole = about("filter") + about("userspace_proxy")
    for _ in range(2_000):
        noisy = bytearray(whole)
        for _ in range(chance.randrange(1, 6)):
            noisy[chance.randrange(len(noisy))] = chance.randrange(256)

        assert all(isinstance(name, bytes) for name in tables_in(bytes(noisy)))


async def test_pauses_may_overlap_and_nothing_is_heard_until_the_last_has_ended(lab: Lab) -> None:
    host = lab.add(f"overheard{len(lab.hosts)}")  # one for each event loop
    heard = asyncio.Event()
    with host.inside():
        watch = RuleWatch()
        watch.listen({"nat"}, heard.set)
    with watch.quiet():
        with watch.quiet():
            pass
        host.run("nft", "add", "table", "ip", "nat")
        await asyncio.sleep(0.1)
        assert not heard.is_set()
    host.run("nft", "add", "chain", "ip", "nat", "more")
    async with asyncio.timeout(20):
        await heard.wait()
    watch.stop()


@pytest.mark.parametrize(
    "change",
    [
        "link add left type veth peer name right",
        "address add 192.0.2.1/32 dev lo",
        "address add fd00:2::1/128 dev lo",
        "route add 192.0.2.0/24 dev lo",
        "-6 route add fd00:2::/64 dev lo",
    ],
)
async def test_a_change_of_the_network_is_noticed_in_either_family(change: str) -> None:
    noticed = asyncio.Event()
    with Lab() as lab:
        host = lab.add("changing")
        with host.inside():
            notices = NetworkNotices(noticed.set)
        try:
            host.ip(*change.split())
            await until(noticed.is_set, "the change is noticed", 20.0)
        finally:
            notices.close()
