"""Whether our rules still stand in the kernel is seen without reading them all."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.modes.redirect_cases import CASES, EVERYTHING, LOCAL, Redirects, name, redirects
from userspace_proxy import netlink
from userspace_proxy.lab import Host
from userspace_proxy.modes.userspace.loader import IptablesKernel, NftKernel
from userspace_proxy.netfilter.elements import NftSocket
from userspace_proxy.netfilter.nfnetlink import count_rules


@pytest.mark.parametrize("wanted", CASES.values(), ids=CASES)
async def test_loaded_rules_are_intact_until_another_program_changes_them(host: Host, wanted: Redirects) -> None:
    kernel = NftKernel()
    with host.inside():
        for touch in (
            "flush chain inet userspace_proxy services4",
            "flush table inet userspace_proxy",
            "delete table inet userspace_proxy",
            "flush ruleset",
            "add rule inet userspace_proxy services accept",
            "insert rule inet userspace_proxy output accept",
        ):
            await kernel.load(wanted.update())
            assert await kernel.is_intact()

            host.run("nft", touch)

            assert not await kernel.is_intact(), touch
            await kernel.remove()
        assert not await kernel.is_intact()


async def test_a_change_leaves_them_intact_and_tables_of_others_do_not_count(host: Host) -> None:
    kernel = NftKernel()
    with host.inside():
        host.run("nft", "table ip userspace_proxy { chain c { accept; }; }; table inet theirs { chain c { accept; }; }")
        for before, wanted in ((None, EVERYTHING), (EVERYTHING, LOCAL), (LOCAL, EVERYTHING)):
            await kernel.load(wanted.update(before))
            assert await kernel.is_intact()
        await kernel.remove()
        assert count_rules("inet userspace_proxy") == 0
        host.run("nft", "delete table ip userspace_proxy; delete table inet theirs")


async def test_looking_costs_the_same_however_many_services_there_are(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = NftKernel()
    rows = [(f"10.96.{n // 250}.{n % 250}", 80, name(f"ns/s{n}"), 10_000 + n) for n in range(10_000)]
    heard = []

    messages = netlink.messages

    def counted(datagram: bytes) -> Iterator[tuple[int, bytes]]:
        heard.append(len(datagram))
        return messages(datagram)

    monkeypatch.setattr("userspace_proxy.netlink.messages", counted)
    bytes_heard = []
    with host.inside():
        for several in (rows[:10], rows):
            await kernel.load(redirects(*several).update())
            heard.clear()
            assert await kernel.is_intact()
            bytes_heard.append(sum(heard))
        await kernel.remove()

    assert bytes_heard[0] == bytes_heard[1] > 0


async def test_a_look_follows_a_load_by_iptables_during_which_nothing_was_heard(host: Host) -> None:
    kernel, looked = IptablesKernel(), asyncio.Event()
    with host.inside():
        await kernel.watch(looked.set)
        await kernel.load(EVERYTHING.update())
        looked.clear()
        try:
            async with asyncio.timeout(20):
                await looked.wait()
        finally:
            kernel.unwatch()
            await kernel.remove()


async def test_a_change_of_one_portal_among_ten_thousand_is_a_few_hundred_bytes(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [(f"10.96.{n // 250}.{n % 250}", 80, name(f"ns/s{n}"), 10_000 + n) for n in range(10_000)]
    everything, fewer = redirects(*rows), redirects(*rows[1:])
    sent, send = list[int](), NftSocket.send

    def counted(sock: NftSocket, batch: bytes, last: int) -> None:
        sent.append(len(batch))
        send(sock, batch, last)

    monkeypatch.setattr(NftSocket, "send", counted)
    kernel = NftKernel()
    with host.inside():
        await kernel.load(everything.update())
        await kernel.load(fewer.update(everything))
        await kernel.remove()

    assert sent[0] > 500_000
    assert sum(sent[1:]) < 1_000
