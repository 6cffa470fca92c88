"""Events are sent to the API server in the background, once, and never delay the caller."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.apiserver import EVENTS, ApiServer, Refusal, api_server
from tests.fakes import FakeClock
from tests.sources.test_kubernetes import kubeconfig
from userspace_proxy.model.names import NamespacedName, ObjectReference
from userspace_proxy.sources.events import EventRecorder, node_reference
from userspace_proxy.sources.login import ApiTransport

PATIENCE_S = 10
NODE = node_reference("node-1")
SERVICE = ObjectReference("Service", NamespacedName("shop", "web"))


@pytest.fixture
async def server() -> AsyncIterator[ApiServer]:
    async with api_server() as server:
        yield server


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def recorder(server: ApiServer, tmp_path: Path, clock: FakeClock) -> AsyncIterator[EventRecorder]:
    transport = ApiTransport(kubeconfig(tmp_path, server.url))
    recorder = EventRecorder(transport.write, "node-1", now=clock, retry_first_s=0.01)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(recorder.run())
        yield recorder
        task.cancel()
    await transport.close()


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not is_so():
            await asyncio.sleep(0.01)


async def test_the_api_server_accepts_events_on_a_node_and_on_a_service(
    server: ApiServer, recorder: EventRecorder
) -> None:
    recorder.normal(NODE, "Starting", "userspace-proxy 1")
    recorder.warn(SERVICE, "FailedToStartServiceHealthcheck", "port 30000 is taken")
    await until(lambda: len(server.events) == 2)

    first, second = server.events
    assert first["regarding"] == {"apiVersion": "v1", "kind": "Node", "name": "node-1", "uid": "node-1"}
    assert (first["metadata"]["namespace"], first["type"], first["reason"]) == ("default", "Normal", "Starting")
    assert second["regarding"] == {"apiVersion": "v1", "kind": "Service", "name": "web", "namespace": "shop"}
    assert (second["metadata"]["namespace"], second["type"]) == ("shop", "Warning")
    assert second["note"] == "port 30000 is taken"
    assert second["reportingController"] == "userspace-proxy"
    assert second["reportingInstance"] == "userspace-proxy-node-1"


async def test_a_repeated_event_is_sent_once_and_counted_later(
    server: ApiServer, recorder: EventRecorder, clock: FakeClock
) -> None:
    for _ in range(5):
        recorder.warn(SERVICE, "BadAnnotation", "no such thing")
    await until(lambda: len(server.events) == 1)
    clock.now_s += 301
    recorder.warn(SERVICE, "BadAnnotation", "no such thing")
    await until(lambda: "series" in server.events[0])

    assert server.events[0]["series"]["count"] == 6
    assert len(server.events) == 1


async def test_an_event_that_the_server_deleted_is_created_again(
    server: ApiServer, recorder: EventRecorder, clock: FakeClock
) -> None:
    recorder.warn(SERVICE, "BadAnnotation", "no such thing")
    await until(lambda: len(server.events) == 1)
    server.events.clear()
    clock.now_s += 3_600
    recorder.warn(SERVICE, "BadAnnotation", "no such thing")

    await until(lambda: len(server.events) == 1)


async def test_a_server_that_is_away_or_busy_is_asked_again(server: ApiServer, recorder: EventRecorder) -> None:
    await server.stop()
    recorder.normal(NODE, "Starting", "")
    await asyncio.sleep(0.02)
    server.refusals += [Refusal(500), Refusal(429), Refusal(401)]
    await server.start()

    await until(lambda: len(server.events) == 1)
    assert recorder.lost == 0


async def test_an_event_that_the_server_rejects_is_lost_and_the_next_is_sent(
    server: ApiServer, recorder: EventRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    server.forbidden.add(EVENTS.format(namespace="shop"))
    recorder.warn(SERVICE, "BadAnnotation", "no such thing")
    recorder.normal(NODE, "Starting", "")
    await until(lambda: len(server.events) == 1)

    assert recorder.lost == 1
    assert "Service shop/web: BadAnnotation: no such thing" in caplog.text
    assert "Events are lost, only the log has them: status 403" in caplog.text


async def test_a_flood_of_events_is_sent_in_part_and_blocks_no_caller(
    server: ApiServer, recorder: EventRecorder
) -> None:
    for number in range(1_000):
        recorder.warn(ObjectReference("Service", NamespacedName("shop", f"web-{number}")), "BadAnnotation", "")
    assert recorder.lost == 900, "so many are waiting, the others are in the log"

    await until(lambda: len(server.events) == 25)
    await asyncio.sleep(0.1)
    assert len(server.events) == 25, "the next one has to wait"


async def test_a_long_note_is_cut_between_characters(server: ApiServer, recorder: EventRecorder) -> None:
    recorder.warn(NODE, "Strange", "é" * 1_000 + "x")
    await until(lambda: len(server.events) == 1)

    assert server.events[0]["note"] == "é" * 512


async def test_without_a_cluster_an_event_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    recorder = EventRecorder()
    with caplog.at_level(logging.INFO):
        recorder.warn(SERVICE, "BadAnnotation", "no such thing")
        recorder.warn(SERVICE, "BadAnnotation", "no such thing")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1):
            await recorder.run()

    assert [record.getMessage() for record in caplog.records] == ["Service shop/web: BadAnnotation: no such thing"]
