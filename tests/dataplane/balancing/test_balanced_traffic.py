"""Balancing of real connections and flows: which backend they reach, also while the algorithm changes."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest

from tests.dataplane.test_tcp import Listener, all_ended, ask, dial
from tests.dataplane.test_udp import Backend, Client
from tests.dataplane.world import CLIENT_IPS, UDP_NAME, Plane, named_backends, running_plane, vanished
from tests.ends import until
from userspace_proxy.model.service import Balance

IPS = ("127.0.0.11", "127.0.0.12", "127.0.0.13")
WEIGHTS = tuple(zip(IPS, (5, 3, 1), strict=True))


@pytest.fixture
async def plane() -> AsyncIterator[Plane]:
    async with running_plane() as running:
        yield running


async def opened(plane: Plane) -> list[int]:
    counters = await plane.of_endpoints()
    return [of_one.opened for _, of_one in sorted(counters.items())]


async def test_a_burst_of_clients_is_spread_by_connections_for_their_weight_dials_included(plane: Plane) -> None:
    with contextlib.ExitStack() as stack:
        backends = [stack.enter_context(Listener(ip)) for ip in IPS]
        await plane.balance(Balance.LEAST_CONNECTIONS, WEIGHTS)
        await plane.use(*(backend.endpoint for backend in backends))

        clients = [await dial() for _ in range(18)]
        accepted = [
            [await backend.accept() for _ in range(2 * weight)]
            for backend, (_, weight) in zip(backends, WEIGHTS, strict=True)
        ]
        assert await opened(plane) == [10, 6, 2]

        for end in accepted[1]:
            end.close()
        for end in clients:
            end.close()
        for end in (*accepted[0], *accepted[2]):
            end.close()
        await all_ended(plane)
    assert {record.why for record in plane.records} == {"least connections"}
    assert all(not counters.dialling and not counters.open for counters in (await plane.of_endpoints()).values())


async def test_a_cut_dial_is_not_counted_any_more(plane: Plane) -> None:
    with Listener("10.97.0.1") as vanishing, vanished("10.97.0.1"):
        await plane.use(vanishing.endpoint)
        client = await dial()
        counters = (await plane.of_endpoints())[vanishing.endpoint.address]

        await until(lambda: counters.dialling == 1, "the dial is under way")
        plane.local.cut()

        assert counters.dialling == 0
        client.close()


async def test_a_change_of_the_algorithm_fails_no_request(plane: Plane) -> None:
    with Listener(IPS[0]) as held, named_backends("a", "b") as (a, b):
        await plane.use(held.endpoint)
        client = await dial()
        backend = await held.accept()
        await plane.use(a.endpoint, b.endpoint)

        for balance in (*Balance, *reversed(Balance)):
            await plane.balance(balance, ((a.endpoint.ip, 2),), slow_start_s=1.0)
            assert {await ask() for _ in range(8)} <= {"a", "b"}

        await client.send(b"still here")
        assert await backend.receive(10) == b"still here"
        client.close()
        backend.close()
        await all_ended(plane)
    assert {record.why for record in plane.records} == {balance.replace("-", " ") for balance in Balance}


async def test_source_hash_gives_a_client_one_endpoint_whatever_its_port(plane: Plane) -> None:
    with named_backends("a", "b", "c") as backends:
        await plane.balance(Balance.SOURCE_HASH)
        await plane.use(*(backend.endpoint for backend in backends))

        for client_ip in CLIENT_IPS:
            assert len({await ask(client_ip=client_ip) for _ in range(4)}) == 1


async def test_flows_of_one_client_have_one_endpoint_by_source_hash(plane: Plane) -> None:
    with contextlib.ExitStack() as stack:
        backends = [stack.enter_context(Backend(ip)) for ip in IPS]
        await plane.balance(Balance.SOURCE_HASH)
        await plane.use(*(backend.endpoint for backend in backends))

        for client_ip in CLIENT_IPS:
            before = await flows(plane)
            for _ in range(4):
                stack.enter_context(Client(source=client_ip)).ask()
            await until_flows(plane, sum(before) + 4)
            assert sorted(now - was for now, was in zip(await flows(plane), before, strict=True)) == [0, 0, 4]


async def test_flows_are_spread_by_flows_for_their_weight(plane: Plane) -> None:
    with contextlib.ExitStack() as stack:
        backends = [stack.enter_context(Backend(ip)) for ip in IPS]
        await plane.balance(Balance.LEAST_CONNECTIONS, WEIGHTS)
        await plane.use(*(backend.endpoint for backend in backends))

        for _ in range(18):
            stack.enter_context(Client()).ask()
        await until_flows(plane, 18)

        assert await flows(plane) == [10, 6, 2]


async def flows(plane: Plane) -> list[int]:
    return [of_one.open for _, of_one in sorted((await plane.of_endpoints(UDP_NAME)).items())]


async def until_flows(plane: Plane, count: int) -> None:
    counters = await plane.counters(UDP_NAME)
    await until(lambda: counters.flows == count, f"{count} flows")
