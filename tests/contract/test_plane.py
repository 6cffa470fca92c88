"""One suite for every data plane: in this process, and in a worker."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.dataplane.world import NamedBackend, named_backends, refusing_endpoint
from tests.ends import until
from userspace_proxy.dataplane.connections import Limits
from userspace_proxy.dataplane.plane import LocalPlane
from userspace_proxy.dataplane.remote import RemotePlane
from userspace_proxy.dataplane.wire import WorkerSettings
from userspace_proxy.errors import SyncError
from userspace_proxy.interfaces import Backends, DataPlane, ListenerSpec, Redirects
from userspace_proxy.lab import ip
from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.names import L4Protocol, NamespacedName, ServicePortName
from userspace_proxy.model.service import ServicePort, portals
from userspace_proxy.rules import nft

NAME = ServicePortName(NamespacedName("shop", "web"), "http", L4Protocol.TCP)
PORTAL_IP, PROXY_PORT = "10.94.0.1", 10_021
PLANES = ["local", "worker"]


def spec(affinity_timeout_s: int | None = None, portal_ip: str = PORTAL_IP) -> ListenerSpec:
    return ListenerSpec(ServicePort(NAME, 80, (portal_ip,), affinity_timeout_s=affinity_timeout_s), PROXY_PORT)


def backends(*endpoints: Endpoint) -> dict[ServicePortName, Backends]:
    return {NAME: Backends(endpoints, endpoints)}


@pytest.fixture(scope="module", autouse=True)
def portal() -> Iterator[None]:
    """The redirect rule of our Service, and a route to it, in the namespace of the tests."""
    ip("route", "add", "10.94.0.0/16", "dev", "lo")
    ip("address", "add", "10.95.0.1/32", "dev", "lo")
    rules = nft.table(Redirects(dict.fromkeys(portals(spec().service_port), PROXY_PORT)))
    subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True, timeout=10)
    yield
    subprocess.run(["nft", "-f", "-"], input=nft.removal(), text=True, check=True, timeout=10)
    ip("address", "del", "10.95.0.1/32", "dev", "lo")
    ip("route", "del", "10.94.0.0/16", "dev", "lo")


@contextlib.asynccontextmanager
async def running(kind: str, tmp_path: Path) -> AsyncIterator[DataPlane]:
    plane: LocalPlane | RemotePlane
    if kind == "local":
        plane = LocalPlane(Limits())
    else:
        plane = RemotePlane(WorkerSettings(Limits(), access_log=str(tmp_path / "access.log")))
        plane.start()
    try:
        yield plane
    finally:
        await plane.close(0)


async def ask(source_ip: str = "10.95.0.1") -> str:
    """Return who answers a connection of its own; raises OSError."""

    def once() -> str:
        with socket.create_connection((PORTAL_IP, 80), timeout=5, source_address=(source_ip, 0)) as sock:
            return sock.recv(100).decode()

    return await asyncio.to_thread(once)


@pytest.fixture
def three() -> Iterator[tuple[NamedBackend, ...]]:
    with named_backends("a", "b", "c") as found:
        yield found


@pytest.mark.parametrize("kind", PLANES)
async def test_connections_take_turns(kind: str, tmp_path: Path, three: tuple[NamedBackend, ...]) -> None:
    async with running(kind, tmp_path) as plane:
        assert await plane.open([spec()]) == {}
        await plane.update(backends(*(backend.endpoint for backend in three)))

        assert [await ask() for _ in range(6)] == ["a", "b", "c", "a", "b", "c"]


@pytest.mark.parametrize("kind", PLANES)
async def test_an_update_is_in_force_when_it_returns(
    kind: str, tmp_path: Path, three: tuple[NamedBackend, ...]
) -> None:
    a, b, _ = three
    async with running(kind, tmp_path) as plane:
        await plane.open([spec()])
        await plane.update(backends(a.endpoint))
        assert await ask() == "a"

        await plane.update(backends(b.endpoint))

        assert {await ask() for _ in range(3)} == {"b"}


@pytest.mark.parametrize("kind", PLANES)
async def test_a_port_that_is_taken_is_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    with socket.create_server(("0.0.0.0", PROXY_PORT)):
        async with running(kind, tmp_path) as plane:
            refused = await plane.open([spec()])
            again = await plane.reserve(PROXY_PORT)

    assert refused == {NAME: f"port {PROXY_PORT}: Address already in use"}
    assert again == f"port {PROXY_PORT}: Address already in use"


@pytest.mark.parametrize("kind", PLANES)
async def test_a_listener_takes_another_affinity_and_keeps_its_port(
    kind: str, tmp_path: Path, three: tuple[NamedBackend, ...]
) -> None:
    async with running(kind, tmp_path) as plane:
        await plane.open([spec()])
        await plane.update(backends(*(backend.endpoint for backend in three)))

        assert await plane.open([spec(affinity_timeout_s=100)]) == {}

        assert len({await ask() for _ in range(4)}) == 1


@pytest.mark.parametrize("kind", PLANES)
async def test_a_retired_listener_is_gone_and_its_port_free(
    kind: str, tmp_path: Path, three: tuple[NamedBackend, ...]
) -> None:
    async with running(kind, tmp_path) as plane:
        await plane.open([spec()])
        await plane.update(backends(three[0].endpoint))

        await plane.retire([NAME])

        with pytest.raises(ConnectionRefusedError):
            await ask()
        assert await plane.open([spec()]) == {}


@pytest.mark.parametrize("kind", PLANES)
async def test_counters_tell_what_happened(kind: str, tmp_path: Path, three: tuple[NamedBackend, ...]) -> None:
    async with running(kind, tmp_path) as plane:
        await plane.open([spec()])
        await plane.update(backends(refusing_endpoint(), three[0].endpoint))
        assert await ask() == "a"
        await _no_connection_is_open(plane)

        (counters,) = (await plane.stats()).services.values()

    assert (counters.accepted, counters.open, counters.endpoints, counters.ejected) == (1, 0, 2, 1)
    assert (counters.dial_failures, counters.retries, counters.bytes_to_clients) == (1, 1, 1)


@pytest.mark.parametrize("kind", PLANES)
async def test_cut_ends_what_a_drain_waits_for(kind: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with running(kind, tmp_path) as plane:
            await plane.open([spec()])
            await plane.update(backends(Endpoint(*silent.getsockname())))
            with await asyncio.to_thread(socket.create_connection, (PORTAL_IP, 80), 5) as client:
                accepted, _ = await asyncio.to_thread(silent.accept)
                with accepted:
                    closing = asyncio.create_task(plane.close(60))
                    await asyncio.sleep(0.05)  # a drain that is not under way yet is cut all the same
                    plane.cut()
                    await asyncio.wait_for(closing, 5)
                    with pytest.raises(ConnectionResetError):
                        client.recv(1)


async def _no_connection_is_open(plane: DataPlane) -> None:
    async with asyncio.timeout(5):
        while (await plane.stats()).connections_open:
            await asyncio.sleep(0.01)


# ---- the worker alone


async def test_a_worker_that_is_killed_is_replaced_and_no_new_client_fails(
    tmp_path: Path, three: tuple[NamedBackend, ...]
) -> None:
    async with running("worker", tmp_path) as plane:
        assert isinstance(plane, RemotePlane)
        await plane.open([spec()])
        await plane.update(backends(*(backend.endpoint for backend in three)))
        killed = plane.pid

        os.kill(killed, signal.SIGKILL)
        seen = [await ask() for _ in range(6)]

        assert set(seen) == {"a", "b", "c"}
        assert plane.pid != killed
        assert (await plane.stats()).worker_restarts == 1


async def test_pins_and_ejections_outlive_a_worker_but_for_the_last_second(
    tmp_path: Path, three: tuple[NamedBackend, ...]
) -> None:
    async with running("worker", tmp_path) as plane:
        assert isinstance(plane, RemotePlane)
        await plane.open([spec(affinity_timeout_s=100)])
        await plane.update(backends(refusing_endpoint(), *(backend.endpoint for backend in three)))
        (first,) = {await ask() for _ in range(3)}
        await until(lambda: bool(plane.known_pins), "the pin is told")

        os.kill(plane.pid, signal.SIGKILL)

        assert {await ask() for _ in range(6)} == {first}


async def test_requests_fail_while_there_is_no_worker_and_what_they_said_is_in_force_with_the_next(
    tmp_path: Path, three: tuple[NamedBackend, ...]
) -> None:
    async with running("worker", tmp_path) as plane:
        assert isinstance(plane, RemotePlane)
        await plane.open([spec()])
        os.kill(plane.pid, signal.SIGKILL)
        failures = 0
        while plane.restarts == 0:
            try:
                await asyncio.wait_for(plane.update(backends(three[0].endpoint)), 5)
            except SyncError:
                failures += 1
            await asyncio.sleep(0)

        assert failures, "a request that nobody can answer fails, it does not wait for ever"
        assert await ask() == "a"
        await _no_connection_is_open(plane)
        (counters,) = (await plane.stats()).services.values()
        assert (counters.endpoints, counters.accepted) == (1, 1), "each answer belongs to its question"


async def test_no_worker_outlives_its_control_process(tmp_path: Path) -> None:
    plane = RemotePlane(WorkerSettings(Limits()))
    plane.start()
    await plane.open([spec()])
    process = plane._process
    assert process is not None
    assert plane._channel is not None

    plane._closing = True
    plane._channel.close()  # as the kernel does for a control process that was killed

    assert await asyncio.to_thread(process.wait, 10) == 0
    await plane.close(0)


def test_a_worker_imports_nothing_of_the_control_side() -> None:
    """Its memory is that of a data plane, and what it does not import cannot stand in a packet's way."""
    code = "import sys; import userspace_proxy.dataplane.worker; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    loaded = set(done.stdout.split())

    assert not loaded & {"yaml", "aiohttp", "click", "rich", "prometheus_client", "watchfiles"}
    assert not [name for name in loaded if name.startswith(("userspace_proxy.control", "userspace_proxy.rules"))]
