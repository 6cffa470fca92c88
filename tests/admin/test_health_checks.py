"""The answers of health-check node ports to load balancers, over real sockets (behaviours H1-H4)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterable

import aiohttp
import pytest

from tests.admin.test_server import Answer, free_ports
from userspace_proxy.admin.health_checks import ServiceHealthChecks
from userspace_proxy.model.health_check import HealthCheck
from userspace_proxy.model.names import NamespacedName

A, B, C, D = (NamespacedName(namespace, name) for namespace, name in ("ab", "cd", "ef", "gh"))


class Rig:
    def __init__(self) -> None:
        self.healthy = True
        self.failed: list[tuple[NamespacedName, str]] = []
        self.addresses: list[str] = []
        self.checks = self.another()

    def another(self) -> ServiceHealthChecks:
        """Return the health checks of another process on the same node."""
        return ServiceHealthChecks(
            lambda: self.healthy, lambda service, reason: self.failed.append((service, reason)), lambda: self.addresses
        )

    async def sync(self, **wanted: tuple[int, int]) -> None:
        names = {"a": A, "b": B, "c": C, "d": D}
        await self.checks.serve({names[name]: HealthCheck(*check) for name, check in wanted.items()})


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[Rig]:
    rig = Rig()
    try:
        yield rig
    finally:
        await rig.checks.close()


async def ask(port: int, path: str = "/healthz", method: str = "GET", host: str = "127.0.0.1") -> Answer:
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}{path}"
    async with aiohttp.ClientSession() as session, session.request(method, url) as response:
        return Answer(response.status, await response.text(), dict(response.headers))


async def told(*ports: int) -> list[tuple[int, int]]:
    """Return the status and the count at each of *ports*."""
    answers = [await ask(port) for port in ports]
    for answer in answers:
        assert answer.headers["X-Load-Balancing-Endpoint-Weight"] == str(answer.json["localEndpoints"])
    return [(answer.status, answer.json["localEndpoints"]) for answer in answers]


async def is_refused(port: int, host: str = "127.0.0.1") -> bool:
    try:
        await ask(port, host=host)
    except aiohttp.ClientConnectorError:
        return True
    return False


async def raw(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


async def test_the_answer_is_kube_proxys_byte_for_byte() -> None:
    (port,) = free_ports(1)
    async with running() as rig:
        await rig.sync(a=(port, 18))
        head, _, body = (await raw(port, b"GET / HTTP/1.1\r\nHost: node\r\n\r\n")).partition(b"\r\n\r\n")

    assert body == (
        b'{\n\t"service": {\n\t\t"namespace": "a",\n\t\t"name": "b"\n\t},\n'
        b'\t"localEndpoints": 18,\n\t"serviceProxyHealthy": true\n}'
    )
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ") for line in lines)
    assert status == "HTTP/1.1 200 OK"
    assert headers.pop("Date").endswith(" GMT")
    assert headers == {
        "Content-Type": "application/json",
        "X-Content-Type-Options": "nosniff",
        "X-Load-Balancing-Endpoint-Weight": "18",
        "Content-Length": str(len(body)),
        "Connection": "close",
    }


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
@pytest.mark.parametrize("path", ["/", "/healthz", "/no/such/path?x=1", "//", "/%00"])
async def test_the_health_check_answer_does_not_depend_on_path_or_method(method: str, path: str) -> None:
    (port,) = free_ports(1)
    async with running() as rig:
        await rig.sync(a=(port, 1))
        answer = await ask(port, path, method)

    assert (answer.status, answer.headers["X-Load-Balancing-Endpoint-Weight"]) == (200, "1")


async def test_a_body_is_taken_no_notice_of() -> None:
    (port,) = free_ports(1)
    async with running() as rig:
        await rig.sync(a=(port, 1))
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"http://127.0.0.1:{port}/", data=b"x" * 1_000_000) as response,
        ):
            answer = await response.json()

    assert answer["localEndpoints"] == 1


async def test_the_server_as_kube_proxys_own_test_has_it() -> None:
    """TestServer of pkg/proxy/healthcheck: there ports and counts are two syncs, so a new port has no count yet."""
    a, b, c, changed, d = free_ports(5)
    async with running() as rig:
        await rig.sync()
        assert await is_refused(a)
        await rig.sync(a=(a, 0))
        assert await told(a) == [(503, 0)]
        for count, status in ((18, 200), (0, 503), (11, 200), (0, 503), (18, 200)):
            await rig.sync(a=(a, count))
            assert await told(a) == [(status, count)]
        await rig.sync()
        assert await is_refused(a)

        await rig.sync(a=(a, 0), b=(b, 0), c=(c, 0))
        assert await told(a, b, c) == [(503, 0), (503, 0), (503, 0)]
        await rig.sync(a=(a, 9), b=(b, 3), c=(c, 7))
        assert await told(a, b, c) == [(200, 9), (200, 3), (200, 7)]

        await rig.sync(b=(b, 3), c=(changed, 0), d=(d, 0))
        assert await told(b, changed, d) == [(200, 3), (503, 0), (503, 0)]
        assert await is_refused(a)
        assert await is_refused(c)
        await rig.sync(b=(b, 3), c=(changed, 7), d=(d, 6))
        assert await told(b, changed, d) == [(200, 3), (200, 7), (200, 6)]
        await rig.sync(b=(b, 0), c=(changed, 7), d=(d, 6))
        assert await told(b, changed, d) == [(503, 0), (200, 7), (200, 6)]

        rig.healthy = False
        assert await told(b, changed, d) == [(503, 0), (503, 7), (503, 6)]
        assert [(await ask(port)).json["serviceProxyHealthy"] for port in (b, changed, d)] == [False] * 3
        rig.healthy = True
        assert await told(b, changed, d) == [(503, 0), (200, 7), (200, 6)]
    assert rig.failed == []


async def test_a_changed_health_check_port_reports_the_current_count_at_once() -> None:
    before, after = free_ports(2)
    async with running() as rig:
        await rig.sync(a=(before, 3))
        await rig.sync(a=(after, 3))

        assert await told(after) == [(200, 3)]
        assert await is_refused(before)


async def test_a_portal_changes_its_service_in_one_sync() -> None:
    first, second = free_ports(2)
    async with running() as rig:
        await rig.sync(a=(first, 1), b=(second, 2))
        await rig.sync(a=(second, 1), b=(first, 2))

        assert [(await ask(port)).json["service"]["namespace"] for port in (first, second)] == ["c", "a"]
    assert rig.failed == []


async def test_an_idle_client_does_not_hold_a_health_check_port() -> None:
    (port,) = free_ports(1)
    async with running() as rig:
        await rig.sync(a=(port, 1))
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HT")
        await ask(port)  # so that the one before is accepted
        async with asyncio.timeout(0.3):
            await rig.sync(b=(port, 2))

        assert (await ask(port)).json["service"] == {"namespace": "c", "name": "d"}
        writer.close()
    assert rig.failed == []


async def test_every_address_of_both_families_answers() -> None:
    (port,) = free_ports(1)
    async with running() as rig:
        await rig.sync(a=(port, 1))

        assert [(await ask(port, host=host)).status for host in ("127.0.0.1", "127.0.0.2", "::1")] == [200] * 3


async def test_only_the_addresses_that_are_given_answer_and_they_may_change() -> None:
    (port,) = free_ports(1)
    async with running() as rig:
        rig.addresses = ["127.0.0.2", "::1"]
        await rig.sync(a=(port, 1))
        assert [(await ask(port, host=host)).status for host in ("127.0.0.2", "::1")] == [200] * 2
        assert await is_refused(port)

        rig.addresses = ["127.0.0.1"]
        await rig.sync(a=(port, 1))
        assert (await ask(port)).status == 200
        assert await is_refused(port, "127.0.0.2")
        assert await is_refused(port, "::1")


async def test_a_taken_port_is_reported_once_and_retried_at_each_sync() -> None:
    port, other = free_ports(2)
    async with running() as rig:
        with socket.create_server(("127.0.0.1", port)):
            for _ in range(3):
                await rig.sync(a=(port, 1), b=(other, 2))
            assert await told(other) == [(200, 2)]
            reason = f"health-check node port {port} cannot be opened: Address already in use"
            assert rig.failed == [(A, reason)]
            assert rig.checks.failures == {A: reason}
        await rig.sync(a=(port, 1), b=(other, 2))

        assert await told(port) == [(200, 1)]
        assert rig.checks.failures == {}


async def test_the_second_of_two_services_with_one_port_gets_it_after_the_first() -> None:
    (port,) = free_ports(1)
    async with running() as rig:
        await rig.sync(a=(port, 1), b=(port, 2))
        assert [service for service, _ in rig.failed] == [B]
        await rig.sync(b=(port, 2))

        assert await told(port) == [(200, 2)]
        assert rig.checks.failures == {}


async def test_an_address_that_is_not_there_leaves_none_of_them_open() -> None:
    (port,) = free_ports(1)
    async with running() as rig:
        rig.addresses = ["127.0.0.1", "192.0.2.1"]
        await rig.sync(a=(port, 1))
        assert await is_refused(port)
        ((service, reason),) = rig.failed
        assert service == A
        assert reason.startswith(f"health-check node port {port} cannot be opened: Cannot assign requested address")
        assert "192.0.2.1" in reason

        rig.addresses = ["127.0.0.1"]
        await rig.sync(a=(port, 1))
        assert await told(port) == [(200, 1)]


async def test_a_service_that_is_gone_is_no_failure_any_more() -> None:
    (port,) = free_ports(1)
    async with running() as rig:
        with socket.create_server(("127.0.0.1", port)):
            await rig.sync(a=(port, 1))
            await rig.sync()
            assert rig.checks.failures == {}
            await rig.sync(a=(port, 1))

    assert len(rig.failed) == 2


async def test_the_ports_of_all_services_hold_a_bounded_number_of_connections_and_answer() -> None:
    first, second = free_ports(2)
    async with running() as rig:
        await rig.sync(a=(first, 1), b=(second, 2))
        held = []
        for number in range(100):
            held.append(await asyncio.open_connection("127.0.0.1", (first, second)[number % 2]))
            held[-1][1].write(b"GET / HT")
        assert await told(first, second) == [(200, 1), (200, 2)]
        async with asyncio.timeout(5):
            for reader, _ in held[:36]:  # those of the longest standing made room
                with contextlib.suppress(ConnectionResetError):
                    assert await reader.read() == b""

        for _, writer in held:
            writer.close()


async def test_heads_are_bounded() -> None:
    (port,) = free_ports(1)
    async with running() as rig:
        await rig.sync(a=(port, 1))
        answer = await raw(port, b"GET / HTTP/1.1\r\nX: " + b"x" * 20_000)

    assert answer.startswith((b"HTTP/1.0 400 ", b"HTTP/1.1 400 "))


# ---- from one process to the next


def duplicates(listeners: Iterable[socket.socket]) -> list[socket.socket]:
    """Return *listeners* as another process would get them."""
    return [sock.dup() for sock in listeners]


async def test_no_client_is_refused_during_a_hand_over() -> None:
    ports = dict(zip((A, B), free_ports(2), strict=True))
    wanted = {service: HealthCheck(port, 1) for service, port in ports.items()}
    rig = Rig()
    statuses: list[int] = []
    done = asyncio.Event()

    async def probe(port: int) -> None:
        while not done.is_set():
            statuses.append((await ask(port)).status)

    await rig.checks.serve(wanted)
    async with asyncio.TaskGroup() as group:
        for port in (*ports.values(), *ports.values()):
            group.create_task(probe(port))
        for _ in range(10):
            successor = rig.another()
            successor.adopt(duplicates(rig.checks.listeners()))
            await rig.checks.close()
            await asyncio.sleep(0.02)  # it reads what there is to serve; who asks waits
            await successor.serve(wanted)
            rig.checks = successor
            await asyncio.sleep(0.02)
        done.set()
    await rig.checks.close()

    assert len(statuses) > 20
    assert set(statuses) == {200}
    assert rig.failed == []


async def test_adopted_health_check_ports_without_a_service_close_at_the_first_sync() -> None:
    kept, gone = free_ports(2)
    async with running() as rig:
        await rig.sync(a=(kept, 1), b=(gone, 1))
        successor = rig.another()
        successor.adopt(duplicates(rig.checks.listeners()))
        await rig.checks.close()
        rig.checks = successor
        await rig.sync(a=(kept, 5))

        assert await told(kept) == [(200, 5)]
        assert await is_refused(gone)


async def test_other_addresses_than_those_that_were_taken_over_are_opened_at_once() -> None:
    (port,) = free_ports(1)
    async with running() as rig:
        await rig.sync(a=(port, 1))
        successor = rig.another()
        successor.adopt(duplicates(rig.checks.listeners()))
        await rig.checks.close()
        rig.checks = successor
        rig.addresses = ["127.0.0.2"]
        await rig.sync(a=(port, 1))

        assert (await ask(port, host="127.0.0.2")).status == 200
        assert await is_refused(port)
    assert rig.failed == []


async def test_addresses_that_were_taken_over_are_known_again() -> None:
    (port,) = free_ports(1)
    async with running() as rig:
        rig.addresses = ["127.0.0.2", "::1"]
        await rig.sync(a=(port, 1))
        inodes = {sock.getsockname()[0]: _inode(sock) for sock in rig.checks.listeners()}
        successor = rig.another()
        successor.adopt(duplicates(rig.checks.listeners()))
        await rig.checks.close()
        rig.checks = successor
        await rig.sync(a=(port, 1))

        assert {sock.getsockname()[0]: _inode(sock) for sock in rig.checks.listeners()} == inodes


def _inode(sock: socket.socket) -> int:
    return os.fstat(sock.fileno()).st_ino
