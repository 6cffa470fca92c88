"""Probes of real servers: which succeed, which fail and why, and when they are sent."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from socketserver import StreamRequestHandler, ThreadingTCPServer

import pytest

from tests.dataplane.test_tcp import local_ports
from userspace_proxy.model.endpoint import Address
from userspace_proxy.model.names import L4Protocol, NamespacedName, ServicePortName
from userspace_proxy.model.probe import EndpointCondition, ProbeKind, ProbeSpec
from userspace_proxy.model.redirects import OWN_MARK
from userspace_proxy.probes import prober as module
from userspace_proxy.probes.attempt import Attempt
from userspace_proxy.probes.prober import Prober, Target

USER = ServicePortName(NamespacedName("default", "web"), "", L4Protocol.TCP)
_BOUND_S = 20.0
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


class Rig:
    """A prober whose changes of verdict tests can wait for."""

    def __init__(self) -> None:
        self._changes: asyncio.Queue[Target] = asyncio.Queue()
        self.prober = Prober(self._changes.put_nowait)

    def probe(self, address: Address, kind: ProbeKind = ProbeKind.TCP, **fields: object) -> Target:
        spec = ProbeSpec(kind, **{"interval_s": 0.1, "timeout_s": 0.1, "rise": 1, "fall": 1, **fields})  # type: ignore[arg-type]
        target = self.prober.add(address, spec)
        target.users.add(USER)
        return target

    async def verdict(self, *, healthy: bool) -> str:
        """Wait for a change of verdict; return its reason."""
        target = await asyncio.wait_for(self._changes.get(), _BOUND_S)
        assert target.is_healthy is healthy, target.health
        return target.health.reason

    async def probed(self, times: int, result: str) -> None:
        async with asyncio.timeout(_BOUND_S):
            while self.prober.stats.results[result] < times:
                await asyncio.sleep(0.01)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    made = Rig()
    yield made
    made.prober.close()


@pytest.fixture
def port() -> Iterator[int]:
    """A port that has no listener and that no other program can bind."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


class AnsweringServer(ThreadingTCPServer):
    """Answers each request with ``parts``, one by one, and notes the requests."""

    def __init__(self, *parts: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.parts = parts
        self.requests: list[bytes] = []

    @property
    def address(self) -> Address:
        ip, port = self.server_address[:2]
        return str(ip), port


class Answer(StreamRequestHandler):
    server: AnsweringServer
    disable_nagle_algorithm = True

    def handle(self) -> None:
        lines = iter(self.rfile.readline, b"\r\n")
        self.server.requests.append(b"".join(lines))
        with contextlib.suppress(OSError):
            for part in self.server.parts:
                self.wfile.write(part)
                time.sleep(0.01)


@contextlib.contextmanager
def answering(*parts: bytes) -> Iterator[AnsweringServer]:
    with AnsweringServer(*parts) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


async def test_a_tcp_probe_succeeds_where_a_server_listens_and_the_server_accepts_nothing(rig: Rig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        target = rig.probe(server.getsockname())
        await rig.probed(3, "success")
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert target.is_healthy


def test_a_server_never_sees_a_tcp_probe_that_is_given_up_once_it_is_connected() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        attempt = Attempt(server.getsockname(), ProbeSpec(ProbeKind.TCP))
        attempt.sock.connect_ex(server.getsockname())

        attempt.close()

        try:
            accepted, _ = server.accept()
        except BlockingIOError:
            return
        with accepted, pytest.raises(ConnectionResetError):  # on a busy machine the kernel's own ACK came first
            accepted.recv(1)


async def test_a_tcp_probe_fails_where_nothing_listens_and_succeeds_once_something_does(rig: Rig) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        rig.probe(server.getsockname())
        assert await rig.verdict(healthy=False) == "tcp: connection refused"
        server.listen()
        assert await rig.verdict(healthy=True) == "tcp: it answers again"


async def test_a_server_that_accepts_and_never_answers_fails_an_http_probe(rig: Rig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        rig.probe(server.getsockname(), ProbeKind.HTTP, path="/ready")
        assert await rig.verdict(healthy=False) == "http /ready: no answer within 0.1 s"
        assert rig.prober.stats.results["timeout"] == 1


async def test_an_http_probe_sends_a_get_that_names_the_endpoint(rig: Rig) -> None:
    with answering(OK) as server:
        target = rig.probe(server.address, ProbeKind.HTTP, path="/ready?deep=1", timeout_s=5.0)
        await rig.probed(1, "success")

        assert server.requests[0].split(b"\r\n")[:2] == [
            b"GET /ready?deep=1 HTTP/1.1",
            f"Host: 127.0.0.1:{server.address[1]}".encode(),
        ]
        assert target.is_healthy


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ((b"HTTP/1.1 503 Service Unavailable\r\n\r\n",), "status 503"),
        ((b"HTTP/1.1 404 Not Found\r\n\r\n",), "status 404"),
        ((b"SSH-2.0-OpenSSH_9.2 and more\r\n",), "no HTTP/1: 'SSH-2.0-Open'"),
        ((b"\x1b[31mred\n and more",), r"no HTTP/1: '\x1b[31mred\n an'"),
        ((), "closed without an answer"),
        ((b"HTTP/1.1",), "closed without an answer"),
    ],
)
async def test_another_answer_fails_an_http_probe_with_its_reason(rig: Rig, parts: tuple[bytes, ...], why: str) -> None:
    with answering(*parts) as server:
        rig.probe(server.address, ProbeKind.HTTP, statuses=(200, 299), timeout_s=5.0)
        assert await rig.verdict(healthy=False) == f"http /: {why}"


async def test_an_answer_in_pieces_and_one_that_never_ends_are_read_as_far_as_the_status(rig: Rig) -> None:
    with answering(b"HT", b"TP/1.", b"0 2", b"04 No Content\r\n") as pieces, answering(OK, b"x" * (8 << 20)) as endless:
        targets = [rig.probe(server.address, ProbeKind.HTTP, timeout_s=5.0) for server in (pieces, endless)]
        await rig.probed(6, "success")
        assert all(target.is_healthy for target in targets)
        assert rig.prober.stats.results["failure"] == 0


class Echo(asyncio.DatagramProtocol):
    """Answers every datagram with itself between two words."""

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self._transport = transport

    def datagram_received(self, data: bytes, addr: Address) -> None:
        self._transport.sendto(b"<" + data + b">", addr)


@pytest.mark.parametrize(
    ("expect", "why"),
    [(b"ping", ""), (b"", ""), (b"pong", "udp: it answered '<ping>'")],
    ids=["the answer", "any answer", "another answer"],
)
async def test_a_udp_probe_looks_into_the_answer(rig: Rig, expect: bytes, why: str) -> None:
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_datagram_endpoint(Echo, ("127.0.0.1", 0))
    try:
        rig.probe(transport.get_extra_info("sockname"), ProbeKind.UDP, send=b"ping", expect=expect, timeout_s=5.0)
        if why:
            assert await rig.verdict(healthy=False) == why
        else:
            await rig.probed(2, "success")
    finally:
        transport.close()


async def test_a_udp_probe_fails_without_an_answer_and_where_it_is_refused(rig: Rig) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        address = silent.getsockname()
        rig.probe(address, ProbeKind.UDP, send=b"ping")
        assert await rig.verdict(healthy=False) == "udp: no answer within 0.1 s"
    rig.probe(address, ProbeKind.UDP, send=b"ping", timeout_s=5.0)
    assert await rig.verdict(healthy=False) == "udp: connection refused"


@pytest.mark.parametrize("kind", ProbeKind)
def test_a_probe_carries_the_mark_that_redirect_rules_skip(kind: ProbeKind) -> None:
    attempt = Attempt(("127.0.0.1", 1), ProbeSpec(kind))
    try:
        assert attempt.sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == OWN_MARK
    finally:
        attempt.close()


def noted(results: str, *, rise: int, fall: int) -> str:
    """Return the verdict, H or U, after each of *results*, + or -."""
    target = Target(("10.0.0.1", 80), ProbeSpec(ProbeKind.TCP, rise=rise, fall=fall), 0.0)
    said = ""
    for result in results:
        target.note("" if result == "+" else "it failed")
        said += "H" if target.is_healthy else "U"
    return said


@pytest.mark.parametrize(
    ("results", "rise", "fall", "verdicts"),
    [
        ("++--++---", 2, 3, "HHHHHHHHU"),
        ("-", 2, 3, "U"),
        ("+---+-++", 2, 3, "HHHUUUUH"),
        ("+-+-+", 1, 1, "HUHUH"),
        ("+---++---", 2, 3, "HHHUUHHHU"),
    ],
    ids=["failures in a row", "a first failure", "successes in a row", "one of each", "all over again"],
)
def test_so_many_results_in_a_row_change_the_verdict(results: str, rise: int, fall: int, verdicts: str) -> None:
    assert noted(results, rise=rise, fall=fall) == verdicts


async def test_the_first_probes_are_spread_evenly_over_the_interval(rig: Rig) -> None:
    targets = [rig.probe(("127.0.0.1", 1), interval_s=100.0) for _ in range(1_000)]
    first = min(target.due_at for target in targets)
    by_second = [0] * 101
    for target in targets:
        by_second[int(target.due_at - first)] += 1

    assert max(by_second) <= 12


async def test_no_more_probes_are_open_or_begin_in_a_tick_than_allowed(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "OPEN_MAX", 3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        for _ in range(8):
            rig.probe(server.getsockname(), ProbeKind.HTTP)
        opened = 0
        async with asyncio.timeout(_BOUND_S):
            while rig.prober.stats.results["timeout"] < 8:
                opened = max(opened, len(rig.prober._open))
                await asyncio.sleep(0.005)

    assert opened == 3


async def test_a_shortage_of_this_host_is_no_verdict_and_is_logged_once(
    rig: Rig, port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_socket(_address: Address) -> socket.SocketType:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr("userspace_proxy.probes.attempt.stream_socket", no_socket)
        target = rig.probe(("127.0.0.1", port))
        await rig.probed(2, "skipped")
        assert target.is_healthy
    assert await rig.verdict(healthy=False) == "tcp: connection refused"
    assert caplog.messages == [f"probes are skipped, such as that of 127.0.0.1:{port}: Too many open files"]


async def test_where_no_local_port_is_left_for_a_udp_probe_there_is_no_verdict(rig: Rig) -> None:
    with contextlib.ExitStack() as held, local_ports(20_000, 20_001):
        for port in (20_000, 20_001):
            sock = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            sock.bind(("0.0.0.0", port))
        target = rig.probe(("127.0.0.1", 9), ProbeKind.UDP, send=b"ping")
        await rig.probed(2, "skipped")

    assert target.is_healthy


async def test_an_endpoint_of_an_address_family_that_this_host_has_not_is_unhealthy(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_family(_address: Address) -> socket.SocketType:
        raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))

    monkeypatch.setattr("userspace_proxy.probes.attempt.stream_socket", no_family)
    rig.probe(("::1", 80))
    assert await rig.verdict(healthy=False) == "tcp: address family not supported by protocol"


async def test_a_target_that_is_removed_is_probed_no_more(rig: Rig) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        hanging = rig.probe(server.getsockname(), ProbeKind.HTTP, interval_s=1.0, timeout_s=1.0)
        gone = rig.probe(server.getsockname())
        await rig.probed(1, "success")
        async with asyncio.timeout(_BOUND_S):
            while hanging not in rig.prober._open:
                await asyncio.sleep(0.01)
        for target in (hanging, gone):
            target.users.clear()
            rig.prober.remove(target)
        began = hanging.started_at, gone.started_at
        stays = rig.probe(server.getsockname())
        await rig.probed(rig.prober.stats.results["success"] + 3, "success")

    assert (hanging.started_at, gone.started_at) == began
    assert hanging not in rig.prober._open
    assert stays.started_at > max(began)


async def test_removed_targets_take_no_more_room_however_many_come_and_go(rig: Rig) -> None:
    stays = rig.probe(("127.0.0.1", 9), interval_s=3600.0)
    for _ in range(3_000):
        gone = rig.probe(("127.0.0.1", 9), interval_s=3600.0)
        gone.users.clear()
        rig.prober.remove(gone)

    assert len(rig.prober._due) < 1_100
    assert stays in {target for _, _, target in rig.prober._due}


async def test_time_in_which_the_process_was_stalled_is_no_time_without_an_answer(rig: Rig) -> None:
    with answering(OK) as server:
        target = rig.probe(server.address, ProbeKind.HTTP)
        async with asyncio.timeout(_BOUND_S):
            while target not in rig.prober._open and not server.requests:
                await asyncio.sleep(0.001)
        time.sleep(0.5)
        await rig.probed(1, "success")

    assert rig.prober.stats.results["timeout"] == 0
    assert EndpointCondition.HEALTHY is target.health.condition
