"""Answers of the health and metrics ports, over real HTTP on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
import socket
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import web

from userspace_proxy.admin import limited
from userspace_proxy.admin.limited import ConnectionSlots
from userspace_proxy.admin.server import AdminServer, Health, is_loopback, split_address
from userspace_proxy.dataplane.sockets import bind_listener
from userspace_proxy.errors import StartError
from userspace_proxy.model.sync_health import FAMILY_NAMES, FamilyHealth


@dataclass
class Answer:
    status: int
    text: str
    headers: dict[str, str]

    @functools.cached_property
    def json(self) -> Any:
        return json.loads(self.text)


UPDATED_AT, UPDATED = 1_700_000_000.0, "2023-11-14T22:13:20Z"
WELL = dict.fromkeys(FAMILY_NAMES, FamilyHealth(healthy=True, updated_at=UPDATED_AT))
LATE = {"IPv4": FamilyHealth(healthy=True, updated_at=UPDATED_AT - 9), "IPv6": FamilyHealth(False, UPDATED_AT)}
NEW = dict.fromkeys(FAMILY_NAMES, FamilyHealth(healthy=True, updated_at=None))
CONFIG = {"kubeproxy.config.k8s.io": {"mode": "userspace"}}


class Rig:
    def __init__(self, degraded_status: int = 200) -> None:
        self.health = Health(WELL)
        self.server = AdminServer(lambda: self.health, self._metrics, "userspace", CONFIG, degraded_status)
        self.healthz, self.metrics = (f"127.0.0.1:{port}" for port in free_ports(2))

    async def _metrics(self, answers: Mapping[tuple[str, int], int]) -> AsyncIterator[bytes]:
        yield b"answers "
        yield f"{dict(answers)}\n".encode()

    async def get(self, address: str, path: str, method: str = "GET") -> Answer:
        async with aiohttp.ClientSession() as session, session.request(method, f"http://{address}{path}") as response:
            return Answer(response.status, await response.text(), dict(response.headers))


def free_ports(count: int) -> list[int]:
    """Return ports that are free at every address; no other program takes them in this private namespace.

    A port that is free at 127.0.0.1 may still belong to a connection of another address, which has just ended.
    """
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(bind_listener(socket.SOCK_STREAM, 0)) for _ in range(count)]
        return [sock.getsockname()[1] for sock in socks]


@contextlib.asynccontextmanager
async def running(degraded_status: int = 200) -> AsyncIterator[Rig]:
    rig = Rig(degraded_status)
    try:
        await rig.server.start(rig.healthz, rig.metrics)
        yield rig
    finally:
        await rig.server.close()


@pytest.mark.parametrize("path", ["/healthz", "/livez"])
async def test_a_healthy_proxy_says_so(path: str) -> None:
    async with running() as rig:
        answer = await rig.get(rig.healthz, path)

    assert answer.status == 200
    assert answer.headers["Content-Type"].startswith("application/json")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.json["lastUpdated"] == answer.json["currentTime"]
    del answer.json["lastUpdated"], answer.json["currentTime"]
    family = {"lastUpdated": UPDATED, "healthy": True}
    assert answer.json == {"healthy": True, "status": {"IPv4": family, "IPv6": family}}


@pytest.mark.parametrize("path", ["/healthz", "/livez"])
async def test_one_family_that_does_not_keep_up_is_no_health(path: str) -> None:
    async with running() as rig:
        rig.health = Health(LATE)
        answer = await rig.get(rig.healthz, path)

    assert (answer.status, answer.json["healthy"]) == (503, False)
    assert [answer.json["status"][family]["healthy"] for family in FAMILY_NAMES] == [True, False]
    assert answer.json["lastUpdated"] == UPDATED, "the newest real update of all families"
    assert "no sync has succeeded" in answer.json["reason"]


async def test_a_failed_sync_is_reported_at_once_and_fails_healthz_only_if_it_lasts() -> None:
    async with running() as rig:
        rig.health = Health(WELL, failing="since noon: nft exited 1")
        soon = [await rig.get(rig.healthz, path) for path in ("/healthz", "/livez")]
        rig.health = Health(LATE, failing="since noon: nft exited 1")
        late = [await rig.get(rig.healthz, path) for path in ("/healthz", "/livez")]

    assert [(answer.status, answer.json["failing"]) for answer in soon] == [(200, "since noon: nft exited 1")] * 2
    assert not any("reason" in answer.json for answer in soon)
    assert [(answer.status, answer.json["reason"]) for answer in late] == [(503, "since noon: nft exited 1")] * 2


async def test_before_the_first_sync_load_balancers_wait_and_kubelets_do_not_mind() -> None:
    async with running() as rig:
        rig.health = Health(NEW, waiting="the first sync is not done", failing="since noon: nft exited 1")
        healthz, livez = [await rig.get(rig.healthz, path) for path in ("/healthz", "/livez")]

    assert (healthz.status, healthz.json["healthy"], healthz.json["lastUpdated"]) == (503, False, None)
    assert healthz.json["status"]["IPv4"] == {"lastUpdated": None, "healthy": True}
    assert healthz.json["reason"] == "the first sync is not done; since noon: nft exited 1"
    assert (livez.status, livez.json["healthy"], "reason" in livez.json) == (200, True, False)


@pytest.mark.parametrize(("degraded_status", "seen"), [(200, (200, 200)), (503, (503, 200))])
async def test_degradation_is_reported_and_fails_healthz_only_if_configured(
    degraded_status: int, seen: tuple[int, int]
) -> None:
    async with running(degraded_status) as rig:
        rig.health = Health(WELL, degraded=["services cannot be followed since noon"])
        answers = [await rig.get(rig.healthz, path) for path in ("/healthz", "/livez")]

    assert tuple(answer.status for answer in answers) == seen
    assert all(answer.json["healthy"] for answer in answers)
    assert all(answer.json["degraded"] == ["services cannot be followed since noon"] for answer in answers)


async def test_a_node_that_is_about_to_go_is_left_and_not_replaced() -> None:
    async with running() as rig:
        rig.health = Health(WELL, node_eligible=False)
        healthz, livez = [await rig.get(rig.healthz, path) for path in ("/healthz", "/livez")]

    assert (healthz.status, healthz.json["nodeEligible"]) == (503, False)
    assert healthz.json["lastUpdated"] == UPDATED
    assert (livez.status, "nodeEligible" in livez.json) == (200, False)


async def test_health_is_asked_for_each_time() -> None:
    async with running() as rig:
        statuses = []
        for families in (WELL, LATE, WELL):
            rig.health = Health(families)
            statuses.append((await rig.get(rig.healthz, "/healthz")).status)

    assert statuses == [200, 503, 200]


async def test_problems_are_shown_and_are_no_reason_to_be_replaced() -> None:
    async with running() as rig:
        rig.health = Health(WELL, problems=["web.yaml:3: 'é' is no port"])
        answer = await rig.get(rig.healthz, "/healthz")

    assert (answer.status, answer.json["problems"]) == (200, ["web.yaml:3: 'é' is no port"])


async def test_a_client_on_this_host_is_told_what_check_finds() -> None:
    async with running() as rig:
        rig.health = Health(WELL, findings=["web.yaml:3: no endpoint is ready"])
        answer = await rig.get(rig.healthz, "/healthz")

    assert (answer.status, answer.json["findings"]) == (200, ["web.yaml:3: no endpoint is ready"])


@pytest.mark.parametrize(
    ("ip", "is_told"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("192.0.2.1", False),
        ("::12", False),
        (None, False),
    ],
)
def test_only_loopback_is_this_host(ip: str | None, is_told: bool) -> None:
    assert is_loopback(ip) is is_told


async def test_metrics_are_text_as_prometheus_wants_it_and_know_what_was_answered() -> None:
    async with running() as rig:
        rig.health = Health(LATE)
        for path in ("/healthz", "/livez", "/healthz"):
            await rig.get(rig.healthz, path)
        answer = await rig.get(rig.metrics, "/metrics")
        assert (await rig.get(rig.metrics, "/metrics", method="HEAD")).status == 200

    assert answer.text == "answers {('healthz', 503): 2, ('livez', 503): 1}\n"
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"


async def test_beside_the_metrics_is_what_kube_proxy_has_there() -> None:
    async with running() as rig:
        rig.health = Health(LATE, waiting="the proxy stops")
        assert (await rig.get(rig.metrics, "/proxyMode")).text == "userspace"
        ping = await rig.get(rig.metrics, "/healthz")
        assert (ping.status, ping.text) == (200, "ok")
        assert (await rig.get(rig.metrics, "/configz")).json == CONFIG
        slis = (await rig.get(rig.metrics, "/metrics/slis")).text.splitlines()

    assert 'kubernetes_healthcheck{name="sync-IPv4",type="livez"} 1.0' in slis
    assert 'kubernetes_healthcheck{name="sync-IPv6",type="healthz"} 0.0' in slis


async def test_the_public_address_serves_health_alone() -> None:
    async with running() as rig:
        statuses = [(await rig.get(rig.healthz, path)).status for path in ("/metrics", "/proxyMode", "/configz", "/")]
        posted = await rig.get(rig.healthz, "/healthz", method="POST")
        asked = await rig.get(rig.healthz, "/healthz", method="HEAD")

    assert statuses == [404, 404, 404, 404]
    assert (posted.status, asked.status) == (405, 200)


async def test_no_address_opens_no_port() -> None:
    rig = Rig()
    await rig.server.start("", "")
    await rig.server.close()

    with pytest.raises(aiohttp.ClientConnectorError):
        await rig.get(rig.healthz, "/healthz")


async def test_after_closing_the_ports_are_free_again() -> None:
    async with running() as rig:
        await rig.get(rig.healthz, "/healthz")

    with pytest.raises(aiohttp.ClientConnectorError):
        await rig.get(rig.healthz, "/healthz")
    await rig.server.start(rig.healthz, rig.metrics)
    await rig.server.close()


async def test_the_unspecified_ipv6_address_is_that_of_both_families() -> None:
    rig = Rig()
    (port,) = free_ports(1)
    try:
        await rig.server.start(f"[::]:{port}", "")
        answers = [await rig.get(f"{host}:{port}", "/healthz") for host in ("127.0.0.1", "[::1]")]
    finally:
        await rig.server.close()

    assert [answer.status for answer in answers] == [200, 200]


async def test_an_ipv6_address_is_written_in_brackets() -> None:
    rig = Rig()
    address = f"[::1]:{free_ports(1)[0]}"
    await rig.server.start(address, "")
    try:
        assert (await rig.get(address, "/healthz")).status == 200
    finally:
        await rig.server.close()


async def test_a_taken_port_is_answered_in_one_line_that_says_what_to_do() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        rig = Rig()
        with pytest.raises(StartError, match="another program has it") as caught:
            await rig.server.start(rig.healthz, address)
        await rig.server.close()

    assert str(caught.value).startswith(f"--metrics-bind-address {address} cannot be bound")
    assert "\n" not in str(caught.value)
    assert "choose another" in str(caught.value)


@pytest.mark.parametrize("address", ["192.0.2.1:10256", "no-such-host.invalid:10256"])
async def test_an_address_that_is_not_this_hosts_is_named(address: str) -> None:
    rig = Rig()
    with pytest.raises(StartError, match="this host does not have it"):
        await rig.server.start(address, "")
    await rig.server.close()


async def open_half(port: int) -> asyncio.StreamWriter:
    """Send half of a request."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: a")
    return writer


async def test_half_sent_requests_keep_no_probe_out() -> None:
    async with running() as rig, contextlib.AsyncExitStack() as stack:
        for address, path in ((rig.healthz, "/livez"), (rig.metrics, "/metrics")):
            for _ in range(80):
                stack.callback((await open_half(int(address.rpartition(":")[2]))).close)
            assert [(await rig.get(address, path)).status for _ in range(5)] == [200] * 5


async def test_a_half_sent_request_ends_with_the_time_for_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited, "_HEADER_TIMEOUT_S", 0.2)
    monkeypatch.setattr(limited, "_SWEEP_EVERY_S", 0.05)
    async with running() as rig, asyncio.timeout(10):
        host, _, port = rig.healthz.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: a")
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()


def slots_of(slots: ConnectionSlots, *clients: tuple[str, int], own: str = "192.0.2.1") -> list[bool]:
    """Connect so often from each of *clients*; return which got a slot."""
    return [
        slots.take(cast("web.RequestHandler", FakeHandler()), (client, 1), (own, 2))
        for client, count in clients
        for _ in range(count)
    ]


class FakeHandler:
    """A connection that never ends by itself."""

    def __init__(self) -> None:
        self.transport: FakeHandler | None = self

    def abort(self) -> None:
        self.transport = None


async def test_the_connections_of_one_client_make_room_for_its_own_only() -> None:
    slots = ConnectionSlots()
    assert all(slots_of(slots, ("198.51.100.1", 100), ("198.51.100.2", 1), ("198.51.100.3", 10)))

    assert Counter(str(slot.client) for slot in slots._slots.values()) == {
        "198.51.100.1": 16,
        "198.51.100.2": 1,
        "198.51.100.3": 10,
    }


async def test_however_many_clients_there_are_some_room_is_for_this_node_alone() -> None:
    slots = ConnectionSlots()
    slots_of(slots, ("127.0.0.1", 3), ("192.0.2.1", 3), ("::1", 1))
    slots_of(slots, *((f"198.51.100.{number}", 16) for number in range(1, 21)))
    held = [slot.client for slot in slots._slots.values()]

    assert held.count(None) == 7
    assert len(held) == 64 + 7


async def test_the_addresses_of_one_ipv6_network_share() -> None:
    slots = ConnectionSlots()
    slots_of(slots, *((f"2001:db8::{number}", 1) for number in range(1, 41)), own="2001:db8:1::1")

    assert len(slots._slots) == 16


async def test_a_client_whose_requests_are_all_being_answered_gets_no_further_slot() -> None:
    slots = ConnectionSlots()
    slots_of(slots, ("198.51.100.1", 16))
    for slot in slots._slots.values():
        slot.request_at = asyncio.get_running_loop().time()

    assert slots_of(slots, ("198.51.100.1", 1), ("198.51.100.2", 1)) == [False, True]


async def test_an_old_connection_ends_after_the_answer_to_its_last_request() -> None:
    """Prometheus keeps a connection: every second scrape each 15 s begins when the connection is 30 s old."""
    loop, slots, scraper = asyncio.get_running_loop(), ConnectionSlots(), FakeHandler()
    slots.take(cast("web.RequestHandler", scraper), ("127.0.0.1", 1), ("127.0.0.1", 2))
    (slot,) = slots._slots.values()
    slot.since, slot.request_at, slot.has_sent_request = loop.time() - 30.1, loop.time() - 0.1, True

    slots._sweep(loop)
    assert scraper.transport is not None, "its answer is not cut"

    slot.request_at = None
    slots._sweep(loop)
    assert scraper.transport is None


@contextlib.contextmanager
def own_address(ip: str) -> Iterator[str]:
    """Give this host *ip*, which is no loopback address, for a while."""
    subprocess.run(["ip", "address", "add", f"{ip}/32", "dev", "lo"], check=True)
    try:
        yield ip
    finally:
        subprocess.run(["ip", "address", "del", f"{ip}/32", "dev", "lo"], check=True)


async def test_other_hosts_get_only_kube_proxys_fields() -> None:
    rig = Rig()
    (port,) = free_ports(1)
    address = f"0.0.0.0:{port}"
    await rig.server.start(address, "")
    try:
        rig.health = Health(LATE, "waits", "nft exited 1", ["secret.yaml:3: a problem"], ["no API"], node_eligible=True)
        with own_address("192.0.2.77") as ip:
            answers = [await rig.get(f"{ip}:{port}", path) for path in ("/healthz", "/livez", "/nothing")]
        own = await rig.get(f"127.0.0.1:{port}", "/healthz")
    finally:
        await rig.server.close()

    for answer in answers[:2]:
        assert set(answer.json) - {"nodeEligible"} == {"lastUpdated", "currentTime", "healthy", "status"}
    assert not any("Server" in answer.headers for answer in answers)
    assert own.json["problems"] == ["secret.yaml:3: a problem"]
    assert "Server" not in own.headers


async def test_an_answer_to_nonsense_names_no_version() -> None:
    async with running() as rig:
        host, _, port = rig.healthz.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"nonsense\r\n\r\n")
        answer = await reader.read(10_000)
        writer.close()

    assert b"aiohttp" not in answer
    assert b"Python" not in answer


@pytest.mark.parametrize(
    "request_text",
    [
        b"GET /healthz HTTP/1.1\r\nHost : a\r\n\r\n",
        b"GET /healthz HTTP/9\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nA: " + b"a" * 100_000,
        b"POST /healthz HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\nnonsense\r\n\r\n",
    ],
    ids=["header", "version", "length", "chunk", "second request"],
)
async def test_a_malformed_request_writes_nothing_to_the_log(
    request_text: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with running() as rig, asyncio.timeout(10):
        host, _, port = rig.healthz.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        with contextlib.closing(writer), contextlib.suppress(ConnectionResetError):
            writer.write(request_text)
            assert re.match(rb"HTTP/1.[01] 40[05] ", await reader.read())

    assert caplog.records == []


async def test_a_scraper_that_leaves_early_writes_nothing_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    ended = asyncio.Event()

    async def metrics(_: Mapping[tuple[str, int], int]) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"." * 100_000
        finally:
            ended.set()

    rig = Rig()
    rig.server = AdminServer(lambda: rig.health, metrics, "userspace", CONFIG)
    await rig.server.start("", rig.metrics)
    try:
        async with asyncio.timeout(10):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(rig.metrics.rpartition(":")[2]))
            with contextlib.closing(writer):
                writer.write(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
                assert await reader.read(1)
            await ended.wait()
    finally:
        await rig.server.close()

    assert caplog.records == []


async def test_a_body_is_not_decompressed() -> None:
    """A megabyte of compressed zeros would take more than a second of CPU."""
    async with running() as rig, asyncio.timeout(10):
        host, _, port = rig.healthz.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"POST /healthz HTTP/1.1\r\nHost: a\r\nContent-Encoding: gzip\r\nContent-Length: 8\r\n\r\nnot gzip"
        )
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        answers = await reader.read()
        writer.close()

    assert b"HTTP/1.1 200" in answers, "the body was skipped, and the next request is answered"


async def test_an_answer_that_fails_by_our_own_fault_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as rig:
        rig.health = cast("Health", None)
        answer = await rig.get(rig.healthz, "/livez")

    assert answer.status == 500
    assert "Error handling request" in caplog.text


async def test_problems_are_reported_in_bounded_number_and_size_without_control_characters() -> None:
    async with running() as rig:
        rig.health = Health(WELL, problems=["\x1b[31m\n\u202e" + "x" * 1_000_000] * 10_000)
        answer = await rig.get(rig.healthz, "/healthz")

    assert len(answer.text) < 50_000
    assert len(answer.json["problems"]) == 51
    assert answer.json["problems"][-1] == "and 9950 more"
    assert all(problem.isprintable() for problem in answer.json["problems"])


async def test_a_slow_client_does_not_hold_up_the_end() -> None:
    rig = Rig()
    await rig.server.start(rig.healthz, "")
    with socket.create_connection(("127.0.0.1", int(rig.healthz.rpartition(":")[2]))) as idle:
        idle.sendall(b"GET /healthz HTTP/1.1\r\n")
        started = time.monotonic()
        await rig.server.close()

    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    ("address", "split"),
    [
        ("127.0.0.1:10249", ("127.0.0.1", 10_249)),
        ("[::1]:10249", ("::1", 10_249)),
        ("[::]:0", ("::", 0)),
        (":10256", ("0.0.0.0", 10_256)),
        ("localhost:1", ("localhost", 1)),
    ],
)
def test_addresses_are_read_as_go_programs_read_them(address: str, split: tuple[str, int]) -> None:
    assert split_address(address, "--flag") == split


@pytest.mark.parametrize(
    "address", ["10249", "127.0.0.1", "127.0.0.1:", "127.0.0.1:http", ":65536", ":-1", ":²", "[::1]"]
)
def test_an_invalid_address_is_refused_with_an_example(address: str) -> None:
    with pytest.raises(StartError, match=r"--flag .* (write it like 127\.0\.0\.1:10249|65536 is not a port)"):
        split_address(address, "--flag")
