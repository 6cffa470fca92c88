"""Endpoints of a Service from a DNS name: real servers at addresses of loopback, manifests in files."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
import pytest

from tests.dns.test_upstream import FIRST, SECOND, failing, serving, silent
from userspace_proxy.api.events import EventType
from userspace_proxy.control import dns_endpoints
from userspace_proxy.control.allocations import ManifestAllocations
from userspace_proxy.control.dns_endpoints import DnsEndpoints
from userspace_proxy.control.memory import SavedAllocations
from userspace_proxy.control.tracker import Tracker
from userspace_proxy.sources.files import FileSource

Answers = Callable[[dns.message.Message], dns.message.Message | None]
WEB = """
apiVersion: v1
kind: Service
metadata:
  name: web
  annotations: {userspace-proxy/endpoints-from: "%s"}
spec:
  clusterIP: 10.96.0.20
  ports: [{name: http, port: 80, targetPort: 8080}, {name: dns, port: 53, protocol: UDP}]
"""


class Zone:
    """Answers for one name; ``answers``: how, instead of with ``addresses``."""

    def __init__(self, *addresses: str) -> None:
        self.addresses: tuple[str, ...] = addresses
        self.answers: Answers | None = None
        self.asked: list[tuple[float, str]] = []

    def answer(self, query: dns.message.Message) -> dns.message.Message | None:
        question = query.question[0]
        self.asked.append((time.monotonic(), question.name.to_text()))
        if self.answers is not None:
            return self.answers(query)
        answer = dns.message.make_response(query)
        for ip in self.addresses:
            if (":" in ip) == (question.rdtype == dns.rdatatype.AAAA):
                answer.answer.append(dns.rrset.from_text(question.name, 600, "IN", "AAAA" if ":" in ip else "A", ip))
        return answer


def unknown(query: dns.message.Message) -> dns.message.Message:
    answer = dns.message.make_response(query)
    answer.set_rcode(dns.rcode.NXDOMAIN)
    return answer


class World:
    """A folder of manifests, a DNS server, and a tracker that follows both."""

    def __init__(self, folder: Path, target: str, *servers: str) -> None:
        self.manifest = folder / "web.yaml"
        self.manifest.write_text(WEB % target)
        (folder / "resolv.conf").write_text("".join(f"nameserver {ip}\n" for ip in servers or (FIRST,)))
        self.source = DnsEndpoints(FileSource([str(self.manifest)]), folder / "resolv.conf")
        self.tracker = Tracker(ManifestAllocations((), SavedAllocations(), ()))
        self.at_synced: set[str] | None = None
        self.changed = asyncio.Condition()

    def endpoints(self) -> set[str]:
        state = self.tracker.state()
        return {f"{e.ip} {e.port} {n.port_name}" for n, known in state.endpoints.items() for e in known}

    async def follow(self) -> None:
        async for batch in self.source.events():
            self.tracker.apply(batch)
            if any(event.type is EventType.SYNCED for event in batch):
                self.at_synced = self.endpoints()
            async with self.changed:
                self.changed.notify_all()

    async def wait_for(self, *expected: str) -> None:
        async with asyncio.timeout(20), self.changed:
            await self.changed.wait_for(lambda: self.at_synced is not None and self.endpoints() == set(expected))

    async def wait_for_problem(self, text: str) -> None:
        async with asyncio.timeout(20):
            while text not in " ".join(self.source.problems.values()):
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def following(folder: Path, target: str, *servers: str) -> AsyncIterator[World]:
    world = World(folder, target, *servers)
    task = asyncio.create_task(world.follow())
    try:
        yield world
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dns_endpoints, "_EVERY_S", 0.01)
    monkeypatch.setattr(dns_endpoints, "_TIMEOUT_S", 0.2)


async def test_every_address_is_an_endpoint_of_every_port_in_the_first_state(tmp_path: Path) -> None:
    zone = Zone("10.0.0.3", "10.0.0.2")
    async with serving(FIRST, zone.answer), following(tmp_path, "dns://web:8080") as world:
        await world.wait_for("10.0.0.2 8080 http", "10.0.0.3 8080 http", "10.0.0.2 8080 dns", "10.0.0.3 8080 dns")

    assert world.at_synced == world.endpoints()
    assert {name for _, name in zone.asked} == {"web."}
    assert not world.source.problems


async def test_without_a_port_the_target_ports_are_used(tmp_path: Path) -> None:
    async with serving(FIRST, Zone("10.0.0.2").answer), following(tmp_path, "dns://web") as world:
        await world.wait_for("10.0.0.2 8080 http", "10.0.0.2 53 dns")


@pytest.mark.parametrize(("target_port", "number"), [('"8081"', 8081), ("0", 80), ("http", 80)])
async def test_a_target_port_is_read_as_for_pods_and_a_name_stands_for_the_port(
    tmp_path: Path, target_port: str, number: int
) -> None:
    async with serving(FIRST, Zone("10.0.0.2").answer), following(tmp_path, "dns://web") as world:
        world.manifest.write_text((WEB % "dns://web").replace("targetPort: 8080", f"targetPort: {target_port}"))
        await world.wait_for(f"10.0.0.2 {number} http", "10.0.0.2 53 dns")


async def test_the_name_is_asked_for_once_a_second(tmp_path: Path) -> None:
    zone = Zone("10.0.0.2")
    async with serving(FIRST, zone.answer), following(tmp_path, "dns://web:8080") as world:
        await world.wait_for("10.0.0.2 8080 http", "10.0.0.2 8080 dns")
        zone.addresses = ("10.0.0.9",)
        await world.wait_for("10.0.0.9 8080 http", "10.0.0.9 8080 dns")

    assert zone.asked[-1][0] - zone.asked[0][0] >= 0.9


@pytest.mark.usefixtures("often")
async def test_the_endpoints_of_a_changed_name_stay_until_the_new_one_is_answered(tmp_path: Path) -> None:
    zone, seen = Zone("10.0.0.2"), []
    async with serving(FIRST, zone.answer), following(tmp_path, "dns://blue:8080") as world:
        await world.wait_for("10.0.0.2 8080 http", "10.0.0.2 8080 dns")
        zone.answers = silent
        world.manifest.write_text(WEB % "dns://green:8080")
        for _ in range(5):
            await asyncio.sleep(0.05)
            seen.append(world.endpoints())
        zone.answers, zone.addresses = None, ("10.0.0.9",)
        await world.wait_for("10.0.0.9 8080 http", "10.0.0.9 8080 dns")

    assert all(seen)


@pytest.mark.parametrize("broken", [failing, silent])
@pytest.mark.usefixtures("often")
async def test_the_last_addresses_stay_while_no_server_answers(tmp_path: Path, broken: Answers) -> None:
    zone = Zone("10.0.0.2")
    async with serving(FIRST, zone.answer), following(tmp_path, "dns://web:8080") as world:
        await world.wait_for("10.0.0.2 8080 http", "10.0.0.2 8080 dns")
        zone.answers = broken
        await world.wait_for_problem("Service default/web: dns://web gives no addresses: the DNS server 127.53.0.1")
        asked = len(zone.asked)
        async with asyncio.timeout(20):
            while len(zone.asked) < asked + 12:
                await asyncio.sleep(0.005)
        assert world.endpoints() == {"10.0.0.2 8080 http", "10.0.0.2 8080 dns"}
        zone.answers, zone.addresses = None, ("10.0.0.4",)
        await world.wait_for("10.0.0.4 8080 http", "10.0.0.4 8080 dns")

    assert not world.source.problems


@pytest.mark.usefixtures("often")
async def test_a_name_without_addresses_is_believed_after_five_answers(tmp_path: Path) -> None:
    zone = Zone("10.0.0.2")
    async with serving(FIRST, zone.answer), following(tmp_path, "dns://web:8080") as world:
        await world.wait_for("10.0.0.2 8080 http", "10.0.0.2 8080 dns")
        zone.asked.clear()
        zone.answers = unknown
        await world.wait_for()
        await world.wait_for_problem("dns://web gives no addresses: the name has none")

    # Of both types, in each round. Rounds may have passed before the change was seen here.
    assert len(zone.asked) >= 2 * 5


@pytest.mark.usefixtures("often")
async def test_the_second_server_is_asked_if_the_first_is_dead(tmp_path: Path) -> None:
    zone = Zone("10.0.0.2")
    async with serving(SECOND, zone.answer), following(tmp_path, "dns://web:8080", FIRST, SECOND) as world:
        await world.wait_for("10.0.0.2 8080 http", "10.0.0.2 8080 dns")


async def test_a_dead_server_delays_no_other_change(tmp_path: Path) -> None:
    async with serving(FIRST, silent), following(tmp_path, "dns://web:8080") as world:
        await world.wait_for()
        slice_of_web = """
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [10.0.0.7]}]
"""
        world.manifest.write_text(WEB % "dns://web:8080" + slice_of_web)
        await world.wait_for("10.0.0.7 8080 http")


@pytest.mark.usefixtures("often")
async def test_endpoints_leave_with_the_annotation(tmp_path: Path) -> None:
    async with serving(FIRST, Zone("10.0.0.2").answer), following(tmp_path, "dns://web:8080") as world:
        await world.wait_for("10.0.0.2 8080 http", "10.0.0.2 8080 dns")
        world.manifest.write_text((WEB % "").replace("endpoints-from", "balance").replace('""', "random"))
        await world.wait_for()


@pytest.mark.usefixtures("often")
async def test_the_problem_of_a_name_ends_with_the_annotation(tmp_path: Path) -> None:
    async with serving(FIRST, unknown), following(tmp_path, "dns://web:8080") as world:
        await world.wait_for_problem("the name has none")
        world.manifest.write_text((WEB % "").replace("endpoints-from", "balance").replace('""', "random"))
        async with asyncio.timeout(20):
            while world.source.problems:
                await asyncio.sleep(0.005)
