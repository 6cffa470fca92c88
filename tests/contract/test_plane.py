"""One suite for every data plane: in this process, in a worker, and in two."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.dataplane.world import NamedBackend, named_backends, refusing_endpoint
from tests.ends import until
from tests.modes.redirect_cases import Redirects
from userspace_proxy.dataplane import process
from userspace_proxy.dataplane.connections import Limits
from userspace_proxy.dataplane.handover import Inherit
from userspace_proxy.dataplane.plane import LocalPlane
from userspace_proxy.dataplane.remote import RemotePlane
from userspace_proxy.dataplane.wire import WorkerSettings
from userspace_proxy.errors import SyncError
from userspace_proxy.interfaces import DataPlane
from userspace_proxy.lab import ip
from userspace_proxy.model.details import DetailsRequest
from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.listeners import Backends, ListenerSpec
from userspace_proxy.model.names import L4Protocol, ListenerName, NamespacedName, Scope, ServicePortName
from userspace_proxy.model.service import ServicePort, portals
from userspace_proxy.modes.userspace import nft
from userspace_proxy.netfilter.nft_text import removal

NAME = ServicePortName(NamespacedName("shop", "web"), "http", L4Protocol.TCP)
LISTENER = ListenerName(NAME)
PORTAL_IP, PROXY_PORT = "10.94.0.1", 10_021
# Of the same service port, another set of endpoints.
LOCAL = ListenerName(NAME, Scope.LOCAL)
EXTERNAL_IP, LOCAL_PROXY_PORT = "10.94.0.2", 10_022
PLANES = ["local", "worker", "two workers"]


def service_port(affinity_timeout_s: int | None = None) -> ServicePort:
    return ServicePort(NAME, 80, (PORTAL_IP,), external_ips=(EXTERNAL_IP,), affinity_timeout_s=affinity_timeout_s)


def spec(affinity_timeout_s: int | None = None) -> ListenerSpec:
    return ListenerSpec(service_port(affinity_timeout_s), PROXY_PORT)


def local_spec(affinity_timeout_s: int | None = None) -> ListenerSpec:
    return ListenerSpec(service_port(affinity_timeout_s), LOCAL_PROXY_PORT, Scope.LOCAL)


def backends(*endpoints: Endpoint) -> dict[ListenerName, Backends]:
    return {LISTENER: Backends(endpoints, endpoints)}


@pytest.fixture(scope="module", autouse=True)
def portal() -> Iterator[None]:
    """The redirect rules of our Service, and a route to it, in the namespace of the tests."""
    ip("route", "add", "10.94.0.0/16", "dev", "lo")
    ip("address", "add", "10.95.0.1/32", "dev", "lo")
    rules = Redirects(dict(zip(portals(service_port()), (PROXY_PORT, LOCAL_PROXY_PORT), strict=True))).nft()
    subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True, timeout=10)
    yield
    subprocess.run(["nft", "-f", "-"], input=removal(nft.TABLE), text=True, check=True, timeout=10)
    ip("address", "del", "10.95.0.1/32", "dev", "lo")
    ip("route", "del", "10.94.0.0/16", "dev", "lo")


@contextlib.asynccontextmanager
async def running(kind: str, tmp_path: Path) -> AsyncIterator[DataPlane]:
    plane: LocalPlane | RemotePlane
    if kind == "local":
        plane = LocalPlane(Limits())
    else:
        workers = 2 if kind == "two workers" else 1
        plane = RemotePlane(WorkerSettings(Limits(), workers=workers, access_log=str(tmp_path / "access.log")))
        plane.start()
    try:
        yield plane
    finally:
        await plane.close(0)


def kept_pins(plane: RemotePlane) -> list[int]:
    """Return the number of pins of each worker that survive if it dies now."""
    return [len(worker.learnt.memory_of(LISTENER.service_port).pins) for worker in plane._workers]


async def ask(source_ip: str = "10.95.0.1", portal_ip: str = PORTAL_IP) -> str:
    """Return the name of the server that answers a new connection; raises OSError."""

    def once() -> str:
        with socket.create_connection((portal_ip, 80), timeout=5, source_address=(source_ip, 0)) as sock:
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

    assert refused == {LISTENER: f"port {PROXY_PORT}: Address already in use"}
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

        await plane.retire([LISTENER])

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

        stats = await plane.stats(endpoints_max=2)
        (counters,) = stats.services.values()
        refused, answered = stats.endpoints[NAME].values()

    assert (refused.dial_failures, refused.ejections, refused.opened) == (1, 1, 0)
    assert (answered.opened, answered.open, answered.retries, answered.bytes_to_clients) == (1, 0, 1, 1)
    assert (counters.accepted, counters.open, counters.endpoints, counters.ejected) == (1, 0, 2, 1)
    assert (counters.dial_failures, counters.retries, counters.bytes_to_clients) == (1, 1, 1)


@pytest.mark.parametrize("kind", PLANES)
async def test_an_ejection_is_reported_with_time_and_reason(
    kind: str, tmp_path: Path, three: tuple[NamedBackend, ...]
) -> None:
    refusing, began_at = refusing_endpoint(), time.time()
    async with running(kind, tmp_path) as plane:
        await plane.open([spec()])
        await plane.update(backends(refusing, three[0].endpoint))
        assert await ask() == "a"
        details = await plane.details(DetailsRequest((NAME,)))
        of_endpoints = {of.address: of for of in details.service_ports[0].endpoints}

    of_refusing = of_endpoints[refusing.address]
    assert of_refusing.last_failure == "Connection refused"
    assert began_at - 0.1 <= of_refusing.failed_at <= time.time() <= of_refusing.ejected_until
    assert of_endpoints[three[0].endpoint.address].opened == 1


@pytest.mark.parametrize("kind", PLANES)
async def test_pinned_clients_and_hidden_endpoints_are_counted(
    kind: str, tmp_path: Path, three: tuple[NamedBackend, ...]
) -> None:
    async with running(kind, tmp_path) as plane:
        await plane.open([spec(affinity_timeout_s=100)])
        await plane.update(backends(*(backend.endpoint for backend in three)))
        for source_ip in ("10.95.0.1", "127.0.0.1", "10.95.0.1"):
            await ask(source_ip)

        stats = await plane.stats(endpoints_max=2)

    assert stats.services[NAME].pins == 2
    assert (stats.endpoints, stats.hidden_endpoints) == ({}, 3)


@pytest.mark.parametrize("kind", PLANES)
async def test_counters_of_many_services_come_whole_though_in_parts(kind: str, tmp_path: Path) -> None:
    names = [ServicePortName(NamespacedName("many", f"s{n}"), "", L4Protocol.TCP) for n in range(600)]
    specs = [ListenerSpec(ServicePort(name, 80, ()), 20_000 + n) for n, name in enumerate(names)]
    async with running(kind, tmp_path) as plane:
        assert await plane.open(specs) == {}
        endpoint = Endpoint("127.0.0.1", 9)
        await plane.update({spec.name: Backends((endpoint,), (endpoint,)) for spec in specs})

        first, second = await asyncio.gather(plane.stats(endpoints_max=600), plane.stats(endpoints_max=599))

    assert first.services.keys() == second.services.keys() == first.endpoints.keys() == set(names)
    assert (second.endpoints, second.hidden_endpoints) == ({}, 600)


@pytest.mark.parametrize("kind", PLANES)
async def test_listeners_of_one_service_port_have_endpoints_of_their_own_and_counters_together(
    kind: str, tmp_path: Path, three: tuple[NamedBackend, ...]
) -> None:
    a, b, c = (backend.endpoint for backend in three)
    async with running(kind, tmp_path) as plane:
        assert await plane.open([spec(), local_spec()]) == {}
        await plane.update({LISTENER: Backends((a, b), (a, b)), LOCAL: Backends((b, c), (b, c))})

        assert {await ask() for _ in range(4)} == {"a", "b"}
        assert {await ask(portal_ip=EXTERNAL_IP) for _ in range(4)} == {"b", "c"}

        await _no_connection_is_open(plane)
        stats = await plane.stats()
        assert list(stats.services) == [NAME]
        counters = stats.services[NAME]
        assert (counters.accepted, counters.bytes_to_clients, counters.endpoints) == (8, 8, 3)

        await plane.retire([LISTENER])
        assert {await ask(portal_ip=EXTERNAL_IP) for _ in range(4)} == {"b", "c"}
        assert (await plane.stats()).services[NAME].endpoints == 2


@pytest.mark.parametrize("kind", PLANES)
async def test_a_client_has_one_pin_at_all_listeners_of_a_service_port(
    kind: str, tmp_path: Path, three: tuple[NamedBackend, ...]
) -> None:
    a, b, c = (backend.endpoint for backend in three)
    async with running(kind, tmp_path) as plane:
        await plane.open([spec(100), local_spec(100)])
        await plane.update({LISTENER: Backends((a, b), (a, b)), LOCAL: Backends((c, b), (c, b))})

        # The first turn is that of an endpoint which the other listener does not have: there the client is pinned anew.
        assert await ask() == "a"
        assert await ask(portal_ip=EXTERNAL_IP) == "c"
        assert await ask() == "b"
        assert [await ask(portal_ip=ip) for ip in (EXTERNAL_IP, PORTAL_IP) * 3] == ["b"] * 6


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
        (killed,) = plane.pids

        os.kill(killed, signal.SIGKILL)
        seen = [await ask() for _ in range(6)]

        assert set(seen) == {"a", "b", "c"}
        assert plane.pids != [killed]
        assert (await plane.stats()).worker_restarts == 1


async def test_pins_and_ejections_outlive_a_worker_but_for_the_last_second(
    tmp_path: Path, three: tuple[NamedBackend, ...]
) -> None:
    async with running("worker", tmp_path) as plane:
        assert isinstance(plane, RemotePlane)
        await plane.open([spec(affinity_timeout_s=100)])
        await plane.update(backends(refusing_endpoint(), *(backend.endpoint for backend in three)))
        (first,) = {await ask() for _ in range(3)}
        await until(lambda: any(kept_pins(plane)), "the control process has the pin")

        os.kill(plane.pids[0], signal.SIGKILL)

        assert {await ask() for _ in range(6)} == {first}


async def test_the_pin_of_all_listeners_outlives_a_worker(tmp_path: Path, three: tuple[NamedBackend, ...]) -> None:
    async with running("worker", tmp_path) as plane:
        assert isinstance(plane, RemotePlane)
        await plane.open([spec(100), local_spec(100)])
        every = backends(*(backend.endpoint for backend in three))[LISTENER]
        await plane.update({LISTENER: every, LOCAL: every})
        pinned = await ask(portal_ip=EXTERNAL_IP)
        await until(lambda: any(kept_pins(plane)), "the control process has the pin")
        assert kept_pins(plane) == [1]
        await plane.retire([LOCAL])
        await plane.open([local_spec(100)])
        await plane.update({LOCAL: every})

        os.kill(plane.pids[0], signal.SIGKILL)

        assert {await ask(portal_ip=ip) for ip in (PORTAL_IP, EXTERNAL_IP) * 3} == {pinned}


async def test_requests_fail_without_a_worker_and_the_next_worker_applies_them(
    tmp_path: Path, three: tuple[NamedBackend, ...]
) -> None:
    async with running("worker", tmp_path) as plane:
        assert isinstance(plane, RemotePlane)
        await plane.open([spec()])
        os.kill(plane.pids[0], signal.SIGKILL)
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


async def test_listeners_that_are_opened_while_there_is_no_worker_are_served_by_the_next(
    tmp_path: Path, three: tuple[NamedBackend, ...]
) -> None:
    async with running("worker", tmp_path) as plane:
        assert isinstance(plane, RemotePlane)
        os.kill(plane.pids[0], signal.SIGSTOP)  # so that it answers neither
        opening = asyncio.create_task(plane.open([spec()]))
        await asyncio.sleep(0)
        os.kill(plane.pids[0], signal.SIGKILL)

        assert await opening == {}, "not refused: else it would be tried at another port, and rules would lead there"

        await until(lambda: plane.restarts == 1 and not plane.failing, "another worker serves")
        await plane.update(backends(three[0].endpoint))
        assert await ask() == "a"


async def test_a_worker_without_keep_on_ends_with_its_control_process() -> None:
    plane = RemotePlane(WorkerSettings(Limits(), orphan_timeout_s=60))
    plane.start()
    await plane.open([spec()])
    (process,) = [worker._process for worker in plane._workers]
    assert process is not None

    plane.leave()  # as the kernel does for a control process that was killed

    assert await asyncio.to_thread(process.wait, 10) == 0
    await plane.close(0)


# ---- what a worker cannot take, or no longer hears


def many(count: int) -> list[ListenerSpec]:
    names = [ServicePortName(NamespacedName("many", f"s{n}"), "", L4Protocol.TCP) for n in range(count)]
    return [ListenerSpec(ServicePort(name, 80, ()), 20_000 + n) for n, name in enumerate(names)]


def leave_room(pid: int, descriptors: int) -> None:
    """Have process *pid* open so many *descriptors* more. Its channel may have a high number, with gaps below it."""
    used = {int(each.name) for each in Path(f"/proc/{pid}/fd").iterdir()}
    limit = 0
    while descriptors:
        descriptors -= limit not in used
        limit += 1
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]))


def limit_next(plane: RemotePlane, descriptors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the worker processes that start after this call open so many *descriptors*."""
    (worker,) = plane._workers
    start = process.WorkerProcess.start

    def limited() -> None:
        start(worker)
        resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (descriptors, descriptors))

    monkeypatch.setattr(worker, "start", limited)


async def test_listeners_for_which_a_worker_has_no_room_are_refused_and_the_others_served(
    tmp_path: Path, three: tuple[NamedBackend, ...]
) -> None:
    async with running("worker", tmp_path) as plane:
        assert isinstance(plane, RemotePlane)
        await plane.open([spec()])
        await plane.update(backends(three[0].endpoint))
        (pid,) = plane.pids
        leave_room(pid, 80)

        specs = many(100)
        refused = await plane.open(specs)

        assert 0 < len(refused) < 100
        assert set(refused.values()) == {"no room: Too many open files"}
        assert await ask() == "a"
        await plane.retire([each.name for each in specs if each.name not in refused])
        assert await plane.open([each for each in specs if each.name in refused][:20]) == {}, "there is room again"
        assert (plane.pids, plane.restarts, plane.failing) == ([pid], 0, "")


async def test_listeners_for_which_a_new_worker_has_no_room_are_served_when_it_has(
    tmp_path: Path, three: tuple[NamedBackend, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running("worker", tmp_path) as plane:
        assert isinstance(plane, RemotePlane)
        specs = many(100)
        await plane.open([*specs, spec()])
        await plane.update(backends(three[0].endpoint))
        limit_next(plane, 80, monkeypatch)
        (killed,) = plane.pids
        os.kill(killed, signal.SIGKILL)
        await until(lambda: plane.pids != [killed], "another one is started")

        await until(lambda: bool(plane.unserved), "it has no room for all")
        assert not plane.failing
        await plane.retire([each.name for each in specs])

        await until(lambda: not plane.unserved, "it has room")
        assert await ask() == "a"
        assert plane.restarts == 1


async def test_a_worker_that_ends_without_room_is_not_followed_by_its_retries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would open listeners twice in the next worker, and take its shortage for the end of it."""
    monkeypatch.setattr(process, "_ROOM_PAUSE_S", 60)
    async with running("worker", tmp_path) as plane:
        assert isinstance(plane, RemotePlane)
        await plane.open(many(60))
        for limit in (80, 8_192):
            limit_next(plane, limit, monkeypatch)
            before = plane.pids
            os.kill(before[0], signal.SIGKILL)
            await until(lambda before=before: plane.pids != before, "another one is started")  # type: ignore[misc]
            await until(lambda: not plane.failing, "it serves what it has room for")
            assert bool(plane.unserved) == (limit == 80)

        assert plane.restarts == 2
        assert "replace the worker process" not in [task.get_name() for task in asyncio.all_tasks()]


async def test_a_listener_that_is_opened_again_before_its_retry_is_served_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running("worker", tmp_path) as plane:
        assert isinstance(plane, RemotePlane)
        specs = many(60)
        await plane.open(specs)
        limit_next(plane, 80, monkeypatch)
        (killed,) = plane.pids
        os.kill(killed, signal.SIGKILL)
        await until(lambda: plane.pids != [killed], "another one is started")
        await until(lambda: bool(plane.unserved), "it has no room for all")
        again = next(each for each in specs if each.name in plane.unserved)
        few = [again.name, *list(plane.unserved)[1:8]]

        await plane.retire([each.name for each in specs if each.name not in few[1:]])
        assert await plane.open([again]) == {}
        await until(lambda: not plane.unserved, "the others are served, too")
        await plane.retire([again.name])

        with pytest.raises(ConnectionRefusedError):
            await asyncio.to_thread(socket.create_connection, ("127.0.0.1", again.proxy_port), 5)


async def test_listeners_go_while_a_new_worker_is_still_sent_all_of_them(
    tmp_path: Path, three: tuple[NamedBackend, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running("worker", tmp_path) as plane:
        assert isinstance(plane, RemotePlane)
        specs = many(1_500)
        await plane.open([*specs, spec()])
        await plane.update(backends(three[0].endpoint))
        (worker,), (killed,) = plane._workers, plane.pids
        start = worker.start

        def start_late() -> None:
            start()
            os.kill(worker.pid, signal.SIGSTOP)

        monkeypatch.setattr(worker, "start", start_late)
        os.kill(killed, signal.SIGKILL)
        await until(lambda: plane.pids != [killed], "another one is started")
        assert worker._channel is not None
        assert len(worker._channel._waiting) > 1, "the kernel takes no more"

        retiring = asyncio.create_task(plane.retire([each.name for each in specs[-10:]]))
        await asyncio.sleep(0)
        os.kill(worker.pid, signal.SIGCONT)
        await retiring

        await until(lambda: not plane.failing, "the other listeners are served")
        assert await ask() == "a"
        assert plane.restarts == 1
        with pytest.raises(ConnectionRefusedError):
            await asyncio.to_thread(socket.create_connection, ("127.0.0.1", specs[-1].proxy_port), 5)


async def test_listeners_that_one_worker_refuses_while_the_other_one_ends_are_refused(tmp_path: Path) -> None:
    async with running("two workers", tmp_path) as plane:
        assert isinstance(plane, RemotePlane)
        await plane.open([spec()])
        full, ending = plane.pids
        leave_room(full, 80)
        os.kill(ending, signal.SIGSTOP)
        specs = many(100)
        opening = asyncio.create_task(plane.open(specs))
        await until(lambda: not plane._workers[0]._waiting and bool(plane._workers[1]._waiting), "one has answered")
        os.kill(ending, signal.SIGKILL)

        refused = await opening

        assert 0 < len(refused) < 100
        await until(lambda: plane.restarts == 1 and not plane.failing, "another worker serves")
        await plane.retire([each.name for each in specs if each.name not in refused])
        again = [each for each in specs if each.name in refused][:20]
        assert await plane.open(again) == {}
        for each in again:
            with contextlib.suppress(ConnectionResetError):  # there is no endpoint
                (await asyncio.to_thread(socket.create_connection, ("127.0.0.1", each.proxy_port), 5)).close()


async def test_a_channel_that_breaks_costs_a_worker_its_listeners_and_no_connection() -> None:
    plane = RemotePlane(WorkerSettings(Limits(), orphan_timeout_s=60))
    with socket.create_server(("127.0.0.1", 0)) as holding:
        plane.start()
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(plane.close, 0)
            await plane.open([spec()])
            await plane.update(backends(Endpoint(*holding.getsockname())))
            with await asyncio.to_thread(socket.create_connection, (PORTAL_IP, 80), 20) as client:
                accepted, _ = await asyncio.to_thread(holding.accept)
                (before,) = plane.pids
                channel = plane._workers[0]._channel
                assert channel is not None
                channel.send(b"\xc1")  # what msgpack never says

                await until(lambda: plane.pids != [before] and not plane.failing, "another worker serves")
                with await asyncio.to_thread(socket.create_connection, (PORTAL_IP, 80), 20):
                    (await asyncio.to_thread(holding.accept))[0].close()
                with accepted:
                    accepted.sendall(b"still there")
                    assert await asyncio.to_thread(client.recv, 100) == b"still there"
            await until(lambda: not Path(f"/proc/{before}").exists(), "the one before ends with its last connection")
            assert plane.restarts == 1


async def test_a_plane_that_is_closed_while_it_opens_listeners_tells_its_worker(
    three: tuple[NamedBackend, ...],
) -> None:
    """The worker would take a channel that breaks for the death of the control process, and serve on."""
    plane = RemotePlane(WorkerSettings(Limits(), orphan_timeout_s=60))
    plane.start()
    await plane.open([spec()])
    await plane.update(backends(three[0].endpoint))
    with socket.socket() as name:
        await asyncio.gather(*plane.keep_on(name))
    channel = plane._workers[0]._channel
    assert channel is not None
    (pid,) = plane.pids
    os.kill(pid, signal.SIGSTOP)
    opening = asyncio.create_task(plane.open(many(1000)))
    await until(lambda: len(channel._waiting) > 1, "the kernel takes no more")

    closing = asyncio.create_task(plane.close(0))
    await asyncio.sleep(0)
    os.kill(pid, signal.SIGCONT)

    await asyncio.wait_for(closing, 4)  # the worker would be killed after 5 s
    assert plane._workers[0]._process is not None
    assert plane._workers[0]._process.returncode == 0
    await opening


async def test_a_worker_that_hangs_is_replaced_and_reported_as_failing_meanwhile(
    tmp_path: Path, three: tuple[NamedBackend, ...]
) -> None:
    async with running("worker", tmp_path) as plane:
        assert isinstance(plane, RemotePlane)
        await plane.open([spec()])
        await plane.update(backends(three[0].endpoint))
        (hanging,) = plane.pids
        os.kill(hanging, signal.SIGSTOP)

        await until(lambda: bool(plane.failing), "it is noticed", 20)

        assert plane.failing == f"worker process {hanging} has not answered for {plane.failing.split()[-4]} s (state T)"
        assert await ask() == "a"
        await until(lambda: not plane.failing, "another one serves")
        assert plane.restarts == 1


# ---- several workers


async def test_a_client_meets_always_the_same_worker_and_all_workers_have_clients(
    tmp_path: Path, three: tuple[NamedBackend, ...]
) -> None:
    """Each worker has its own rotation, so a client's turns are exact only if one worker serves all its connections."""
    sources = [f"10.95.7.{number}" for number in range(1, 21)]
    for source in sources:
        ip("address", "add", f"{source}/32", "dev", "lo")
    try:
        async with running("two workers", tmp_path) as plane:
            assert isinstance(plane, RemotePlane)
            await plane.open([spec(affinity_timeout_s=100)])
            await plane.update(backends(*(backend.endpoint for backend in three)))

            seen = {source: {await ask(source) for _ in range(3)} for source in sources}
            await plane.stats()

            assert all(len(answers) == 1 for answers in seen.values()), "a client with a pin in each worker wanders"
            pins = kept_pins(plane)
            assert sum(pins) == len(sources), "no client is known to two workers"
            assert min(pins) > 0
    finally:
        for source in sources:
            ip("address", "del", f"{source}/32", "dev", "lo")


async def test_one_of_two_workers_that_is_killed_costs_the_other_s_clients_nothing(
    tmp_path: Path, three: tuple[NamedBackend, ...]
) -> None:
    async with running("two workers", tmp_path) as plane:
        assert isinstance(plane, RemotePlane)
        await plane.open([spec()])
        await plane.update(backends(*(backend.endpoint for backend in three)))
        for index in (0, 1):
            os.kill(plane.pids[index], signal.SIGKILL)

            assert {await ask() for _ in range(6)} == {"a", "b", "c"}

        await until(lambda: plane.restarts == 2, "both were replaced")


# ---- from one control process to the next


Inherited = list[tuple[Inherit, list[socket.socket]]]


def inheritance(before: RemotePlane) -> Inherited:
    """Return what a successor gets, with copies of the descriptors in the place of those that a socket carries."""
    return [
        (inherit, [socket.socket(fileno=os.dup(descriptor)) for descriptor in descriptors])
        for inherit, descriptors in before.inheritance()
    ]


async def take_over(before: RemotePlane, after: RemotePlane) -> list[ListenerSpec]:
    """As two control processes do."""
    return await after.adopt(inheritance(before))


@pytest.mark.parametrize(("workers_before", "workers_after"), [(1, 1), (1, 2), (2, 1), (2, 2)])
async def test_listeners_pins_and_endpoints_go_over_to_another_plane(
    tmp_path: Path, three: tuple[NamedBackend, ...], workers_before: int, workers_after: int
) -> None:
    before = RemotePlane(WorkerSettings(Limits(), workers=workers_before))
    after = RemotePlane(WorkerSettings(Limits(), workers=workers_after))
    before.start()
    specs = [spec(affinity_timeout_s=100), local_spec(affinity_timeout_s=100)]
    await before.open(specs)
    every = backends(*(backend.endpoint for backend in three))[LISTENER]
    await before.update({LISTENER: every, LOCAL: every})
    (pinned,) = {await ask(portal_ip=ip) for ip in (PORTAL_IP, EXTERNAL_IP)}
    await before.stats()

    after.start()
    assert await take_over(before, after) == specs
    await after.begin(await before.make_way(workers_after, time.monotonic()))
    await before.close(0, successors=workers_after)

    try:
        assert {await ask(portal_ip=ip) for ip in (PORTAL_IP, EXTERNAL_IP) * 3} == {pinned}
        assert await after.open([spec(), local_spec()]) == {}, "they can be opened anew"
        assert {await ask() for _ in range(6)} == {"a", "b", "c"}
    finally:
        await after.close(0)


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_pin_that_is_set_during_a_hand_over_goes_over_too(
    three: tuple[NamedBackend, ...], workers: int
) -> None:
    """The predecessor sets pins after it has sent them, until it makes way."""
    sources = [f"10.95.7.{number}" for number in range(1, 7)]
    for source in sources:
        ip("address", "add", f"{source}/32", "dev", "lo")
    before, after = (RemotePlane(WorkerSettings(Limits(), workers=workers)) for _ in range(2))
    before.start()
    try:
        await before.open([spec(affinity_timeout_s=100)])
        await before.update(backends(*(backend.endpoint for backend in three)))
        pinned = {source: await ask(source) for source in sources[:2]}
        since = time.monotonic()
        await before.stats()
        inherited = inheritance(before)
        pinned |= {source: await ask(source) for source in sources[2:4]}
        after.start()
        await after.adopt(inherited)
        pinned |= {source: await ask(source) for source in sources[4:]}
        assert {source: await ask(source) for source in sources} == pinned, "one of both accepts"

        await after.begin(await before.make_way(workers, since))
        await before.close(0, successors=workers)

        assert {source: await ask(source) for source in sources[::-1]} == pinned
    finally:
        await after.close(0)
        for source in sources:
            ip("address", "del", f"{source}/32", "dev", "lo")


async def test_a_worker_that_has_made_way_ends_with_its_connections_if_its_control_process_dies_then() -> None:
    """It has no listeners left to hand over, so it must not wait for a successor."""
    before = RemotePlane(WorkerSettings(Limits(), orphan_timeout_s=60))
    with socket.create_server(("127.0.0.1", 0)) as holding, socket.socket() as name:
        before.start()
        await before.open([spec()])
        await before.update(backends(Endpoint(*holding.getsockname())))
        await asyncio.gather(*before.keep_on(name))
        (process,) = [worker._process for worker in before._workers]
        assert process is not None
        with await asyncio.to_thread(socket.create_connection, (PORTAL_IP, 80), 20) as client:
            accepted, _ = await asyncio.to_thread(holding.accept)
            await before.make_way(1, time.monotonic())

            before.leave()  # as the kernel does for a control process that was killed

            with accepted:
                accepted.sendall(b"still there")
                assert await asyncio.to_thread(client.recv, 100) == b"still there"
        assert await asyncio.to_thread(process.wait, 10) == 0
    await before.close(0)


async def test_no_connection_fails_while_planes_change(three: tuple[NamedBackend, ...]) -> None:
    planes = [RemotePlane(WorkerSettings(Limits())) for _ in range(4)]
    planes[0].start()
    await planes[0].open([spec()])
    await planes[0].update(backends(*(backend.endpoint for backend in three)))
    seen: list[str] = []
    done = asyncio.Event()

    async def keep_asking() -> None:
        while not done.is_set():
            seen.append(await ask())

    asking = [asyncio.create_task(keep_asking()) for _ in range(3)]
    for before, after in itertools.pairwise(planes):
        after.start()
        await take_over(before, after)
        await before.close(5, successors=1)
    done.set()
    await asyncio.gather(*asking)  # raises what failed

    assert len(seen) > 10
    await planes[-1].close(0)


def test_a_worker_imports_nothing_of_the_control_side() -> None:
    """The worker needs only a data plane's memory, and code that it does not import cannot delay a packet."""
    code = "import sys; import userspace_proxy.dataplane.worker; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True)
    loaded = set(done.stdout.split())

    assert not loaded & {"yaml", "aiohttp", "click", "rich", "prometheus_client", "inotify_simple"}
    assert not [name for name in loaded if name.startswith(("userspace_proxy.control", "userspace_proxy.modes"))]
