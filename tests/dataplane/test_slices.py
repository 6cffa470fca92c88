"""Packets are handled between two slices of long work. A clock that moves with every reading makes each item a slice.

Clients and endpoints run in the data plane's event loop, so the number of its turns for a request is the same on any
machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import pytest

from tests.dataplane.test_udp import Backend, Client
from tests.dataplane.world import LISTENER, PORTAL, UDP_LISTENER, UDP_NAME, Plane, running_plane, service_port
from tests.ends import until
from userspace_proxy.dataplane.slices import SLICE_S
from userspace_proxy.model.counters import Counters
from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.listeners import Backends, ListenerSpec

FIRST_PORT, COUNT = 11_000, 400


def many() -> list[ListenerSpec]:
    """Return listeners without clients."""
    known = service_port()
    names = [known.name._replace(port_name=f"http-{number}") for number in range(COUNT)]
    return [ListenerSpec(replace(known, name=name), FIRST_PORT + number) for number, name in enumerate(names)]


@asynccontextmanager
async def answering() -> AsyncIterator[Endpoint]:
    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"a")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield Endpoint(*server.sockets[0].getsockname())


async def ask() -> bytes:
    reader, writer = await asyncio.open_connection(*PORTAL)
    try:
        return await reader.read()
    finally:
        writer.close()


async def work(plane: Plane, kind: str) -> None:
    names = [spec.name for spec in many()]
    match kind:
        case "open":
            assert await plane.local.open(many()) == {}
        case "update":
            await plane.local.update(dict.fromkeys(names, Backends((), ())))
        case "retire":
            await plane.local.retire([*names, LISTENER])
        case "stop accepting":
            await plane.local.stop_accepting()


@pytest.mark.parametrize("kind", ["open", "update", "retire", "stop accepting"])
async def test_a_request_is_answered_between_two_slices(kind: str) -> None:
    ticks = itertools.count()
    async with answering() as endpoint, running_plane(now=lambda: next(ticks) * SLICE_S) as plane:
        if kind != "open":
            await plane.local.retire([LISTENER])  # it is the last listener from now on
            assert await plane.local.open([*many(), *plane.specs]) == {}
        await plane.use(endpoint)
        working = asyncio.create_task(work(plane, kind))

        assert await ask() == b"a"

        assert not working.done(), "the request did not wait for all of it"
        await working


@pytest.mark.parametrize("kind", ["update", "retire"])
async def test_a_request_is_answered_while_the_udp_flows_of_a_removed_endpoint_end(kind: str) -> None:
    ticks = itertools.count()
    async with answering() as endpoint, running_plane(now=lambda: next(ticks) * SLICE_S) as plane:
        with contextlib.ExitStack() as stack:
            backend = stack.enter_context(Backend())
            of_udp = Backends((backend.endpoint,), (backend.endpoint,))
            await plane.local.update({LISTENER: Backends((endpoint,), ()), UDP_LISTENER: of_udp})
            counters = await plane.counters(UDP_NAME)  # live
            for number in range(1, COUNT + 1):
                stack.enter_context(Client()).ask()
                await until(partial(_has_flows, counters, number), "the flow has begun")
            if kind == "update":
                working = asyncio.create_task(plane.local.update({UDP_LISTENER: Backends((), ())}))
            else:
                working = asyncio.create_task(plane.local.retire([UDP_LISTENER]))

            assert await ask() == b"a"

            assert not working.done(), "the request did not wait for all flows"
            await working
            assert counters.flows == 0


def _has_flows(counters: Counters, number: int) -> bool:
    return counters.flows == number
