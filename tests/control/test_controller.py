"""The control loop: when it syncs, which state it applies, and how it handles failures."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime

import msgspec
import pytest

from tests.control.given import SYNCED, endpoint_slice, gone, port_named, put, service
from userspace_proxy import api
from userspace_proxy.api.events import ObjectEvent
from userspace_proxy.control.allocations import ManifestAllocations
from userspace_proxy.control.controller import Controller
from userspace_proxy.control.pacer import Pacer
from userspace_proxy.control.tracker import Tracker
from userspace_proxy.errors import SyncError
from userspace_proxy.model.state import ProxyState
from userspace_proxy.model.watch_stats import WatchStats

_BOUND_S = 5.0


class FakeSource:
    """Yields the events that the test gives it."""

    def __init__(self) -> None:
        self._batches: asyncio.Queue[Sequence[ObjectEvent]] = asyncio.Queue()
        self.problems: Mapping[str, str] = {}
        self.watches: Sequence[WatchStats] = ()

    def tell(self, *things: api.KubernetesObject | ObjectEvent) -> None:
        self._batches.put_nowait([thing if isinstance(thing, ObjectEvent) else put(thing) for thing in things])

    async def events(self) -> AsyncIterator[Sequence[ObjectEvent]]:
        while True:
            yield await self._batches.get()
            self._batches.task_done()

    async def taken(self) -> None:
        """Wait until the controller has taken all events."""
        await asyncio.wait_for(self._batches.join(), _BOUND_S)


class FakeSink:
    """Records each state; raises ``refusal`` if it is set; each sync waits until ``gate`` is open."""

    def __init__(self) -> None:
        self.states: list[ProxyState] = []
        self.refusal = ""
        self.gate = asyncio.Event()
        self.gate.set()
        self.busy = False
        self._called = asyncio.Condition()

    async def sync(self, state: ProxyState) -> None:
        assert not self.busy, "two syncs at once"
        self.busy = True
        async with self._called:
            self.states.append(state)
            self._called.notify_all()
        await self.gate.wait()
        self.busy = False
        if self.refusal:
            raise SyncError(self.refusal)

    async def called(self, times: int) -> None:
        """Wait until sync was called that many times in all."""
        async with self._called:
            await asyncio.wait_for(self._called.wait_for(lambda: len(self.states) >= times), _BOUND_S)


class Rig:
    def __init__(
        self,
        after_sync: Callable[[], None] = lambda: None,
        health_timeout_s: float = 60.0,
        filtered: Callable[[ProxyState], ProxyState] = lambda state: state,
    ) -> None:
        self.source, self.sink = FakeSource(), FakeSink()
        self.tracker = Tracker(ManifestAllocations([ipaddress.ip_network("10.96.0.0/16")]))
        pacer = Pacer(asyncio.get_running_loop().time, min_period_s=0, max_retry_s=0.01)
        self.controller = Controller(
            self.source, self.tracker, [self.sink], pacer, after_sync, health_timeout_s, filtered
        )

    @property
    def healthy(self) -> dict[str, bool]:
        return {family: of_it.healthy for family, of_it in self.controller.sync_health.of_families().items()}

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(_BOUND_S):
            while not condition():
                await asyncio.sleep(0.001)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Rig]:
        task = asyncio.create_task(self.controller.run())
        try:
            yield self
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


async def test_nothing_is_synced_before_the_initial_list_is_complete() -> None:
    async with Rig().running() as rig:
        rig.source.tell(service())
        rig.source.tell(endpoint_slice("10.0.0.1"))
        await rig.source.taken()
        await asyncio.sleep(0.02)  # four times as long as a change is gathered for
        assert not rig.sink.states
        assert not rig.controller.ready.is_set()

        rig.source.tell(SYNCED)
        await rig.sink.called(1)

        assert [str(e) for e in rig.sink.states[0].endpoints[port_named("web")]] == ["10.0.0.1:8080"]


async def test_a_sync_that_is_asked_for_during_the_first_one_is_made() -> None:
    async with Rig().running() as rig:
        rig.controller.sync_again()
        await asyncio.sleep(0.02)
        assert not rig.sink.states, "the list is not complete"

        rig.sink.gate.clear()
        rig.source.tell(service(), SYNCED)
        await rig.sink.called(1)
        rig.controller.sync_again()
        rig.sink.gate.set()
        await rig.sink.called(2)


async def test_sinks_get_the_filtered_state_and_the_log_reports_the_whole_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def without_endpoints(state: ProxyState) -> ProxyState:
        return replace(state, endpoints=dict.fromkeys(state.endpoints, ()))

    caplog.set_level(logging.INFO)
    async with Rig(filtered=without_endpoints).running() as rig:
        rig.source.tell(service(), SYNCED)
        await rig.sink.called(1)
        rig.source.tell(endpoint_slice("10.0.0.1"))
        await rig.sink.called(2)
        await rig.until(lambda: rig.controller.syncs == 2)

        assert rig.sink.states[1].endpoints == {port_named("web"): ()}
        assert [str(e) for e in rig.controller.desired.endpoints[port_named("web")]] == ["10.0.0.1:8080"]
    assert "default/web: 1 endpoint, 1 ready; added 10.0.0.1:8080" in caplog.messages


async def test_the_programming_latency_of_an_endpoint_change_is_measured() -> None:
    async with Rig().running() as rig:
        before = datetime.fromtimestamp(time.time() - 60, UTC).isoformat()
        rig.source.tell(triggered(before), SYNCED)  # an old change: no sync of this process applied it
        await rig.sink.called(1)
        rig.sink.refusal = "not now"
        rig.source.tell(triggered(datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f000Z"), "10.0.0.1"))
        await rig.sink.called(3)
        assert rig.controller.programming["IPv4"].buckets()[-1][1] == 0

        rig.sink.refusal = ""
        await rig.until(lambda: rig.controller.programming["IPv4"].buckets()[-1][1] == 1)
        assert rig.controller.programming["IPv6"].buckets()[-1][1] == 0
        assert rig.controller.durations.buckets()[-1][1] == rig.controller.syncs


def triggered(at: str, *ips: str) -> api.EndpointSlice:
    """Return a slice that its controller wrote because of a change *at*."""
    plain = endpoint_slice(*ips)
    annotations = {"endpoints.kubernetes.io/last-change-trigger-time": at}
    return msgspec.structs.replace(plain, metadata=msgspec.structs.replace(plain.metadata, annotations=annotations))


async def test_an_empty_cluster_is_synced_too() -> None:
    async with Rig().running() as rig:
        rig.source.tell(SYNCED)

        await asyncio.wait_for(rig.controller.ready.wait(), _BOUND_S)

        assert rig.sink.states == [ProxyState()]


async def test_ready_is_logged_after_the_first_successful_sync() -> None:
    async with Rig().running() as rig:
        rig.sink.gate.clear()
        rig.source.tell(service(), SYNCED)
        await rig.sink.called(1)
        assert not rig.controller.ready.is_set()
        assert rig.controller.synced_at is None

        rig.sink.gate.set()
        await asyncio.wait_for(rig.controller.ready.wait(), _BOUND_S)

        assert rig.controller.synced_at is not None


async def test_each_change_reaches_the_sink() -> None:
    async with Rig().running() as rig:
        rig.source.tell(service("a"), SYNCED)
        await rig.sink.called(1)

        rig.source.tell(service("b"))
        await rig.sink.called(2)
        rig.source.tell(gone("Service", "a"))
        await rig.sink.called(3)

        assert [sorted(name.service.name for name in state.service_ports) for state in rig.sink.states] == [
            ["a"],
            ["a", "b"],
            ["b"],
        ]


async def test_changes_that_come_together_are_synced_together() -> None:
    async with Rig().running() as rig:
        rig.source.tell(SYNCED)
        await rig.until(rig.controller.ready.is_set)

        for n in range(20):
            rig.source.tell(service(f"s{n}"))
        await rig.until(lambda: len(rig.sink.states[-1].service_ports) == 20)

        assert len(rig.sink.states) <= 3


async def test_a_change_during_a_sync_is_synced_after_it() -> None:
    async with Rig().running() as rig:
        rig.sink.gate.clear()
        rig.source.tell(service("a"), SYNCED)
        await rig.sink.called(1)

        rig.source.tell(service("b"))
        await rig.source.taken()
        rig.sink.gate.set()
        await rig.sink.called(2)

        assert port_named("b") in rig.sink.states[1].service_ports
        assert port_named("b") not in rig.sink.states[0].service_ports


async def test_a_failed_sync_is_repeated_with_the_same_state_until_it_succeeds() -> None:
    async with Rig().running() as rig:
        rig.sink.refusal = "no privilege"
        rig.source.tell(service(), SYNCED)

        await rig.sink.called(3)
        rig.sink.refusal = ""
        await asyncio.wait_for(rig.controller.ready.wait(), _BOUND_S)

        assert all(state is rig.sink.states[0] for state in rig.sink.states)


async def test_a_failure_is_reported_with_its_start_while_it_lasts(caplog: pytest.LogCaptureFixture) -> None:
    async with Rig().running() as rig:
        rig.sink.refusal = "no privilege"
        rig.source.tell(service(), SYNCED)
        await rig.sink.called(3)
        assert rig.controller.error == "no privilege"
        since = rig.controller.failing_since
        assert since is not None
        await rig.sink.called(5)
        assert rig.controller.failing_since == since
        said = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert len(said) == 1
        assert "the previous state stays in force: no privilege" in said[0].getMessage()

        rig.sink.refusal = ""
        await rig.until(rig.controller.ready.is_set)

        assert rig.controller.error == ""
        assert rig.controller.failing_since is None


async def test_a_failure_makes_a_proxy_unhealthy_only_after_the_timeout() -> None:
    rig = Rig(health_timeout_s=0.3)
    async with rig.running():
        rig.source.tell(service())
        await rig.source.taken()
        assert rig.healthy == {"IPv4": True, "IPv6": True}
        assert not rig.controller.sync_health.queued_at, "nothing is asked for before all is told"
        rig.source.tell(SYNCED)
        await rig.until(rig.controller.ready.is_set)
        rig.sink.refusal = "no privilege"

        rig.source.tell(endpoint_slice("10.0.0.1"))
        await rig.until(lambda: rig.controller.failures >= 2)
        assert rig.healthy == {"IPv4": True, "IPv6": True}
        await rig.until(lambda: not rig.healthy["IPv4"])
        assert rig.healthy["IPv6"], "the slice was one of IPv4"

        rig.sink.refusal = ""
        await rig.until(lambda: rig.healthy["IPv4"])
        assert rig.controller.error == ""


async def test_changes_are_counted_and_pending_until_a_sync_applies_them() -> None:
    async with Rig().running() as rig:
        services, endpoints = rig.controller.changes["service"], rig.controller.changes["endpoint"]
        rig.source.tell(service("a"), service("b"), endpoint_slice("10.0.0.1"), SYNCED)
        rig.sink.refusal = "not now"
        await rig.sink.called(2)
        assert (services.total, services.pending, endpoints.total, endpoints.pending) == (2, 2, 1, 1)

        rig.sink.refusal = ""
        await rig.until(rig.controller.ready.is_set)
        assert (services.total, services.pending, endpoints.total, endpoints.pending) == (2, 0, 1, 0)

        rig.sink.gate.clear()
        rig.source.tell(gone("Service", "a"))
        await rig.sink.called(len(rig.sink.states) + 1)
        rig.source.tell(endpoint_slice("10.0.0.2"))
        await rig.source.taken()
        assert (services.pending, endpoints.pending) == (1, 1)
        rig.sink.gate.set()
        await rig.until(lambda: not endpoints.pending)
        assert (services.total, endpoints.total, services.pending) == (3, 2, 0)


async def test_a_change_while_syncs_fail_is_in_the_next_try() -> None:
    async with Rig().running() as rig:
        rig.source.tell(service("a"), SYNCED)
        await rig.until(rig.controller.ready.is_set)
        rig.sink.refusal = "no privilege"
        rig.source.tell(service("b"))
        await rig.sink.called(3)

        rig.source.tell(service("c"))
        await rig.until(lambda: port_named("c") in rig.sink.states[-1].service_ports)

        assert rig.controller.error == "no privilege"
        assert rig.controller.ready.is_set()


async def test_a_bad_object_never_stops_the_others() -> None:
    async with Rig().running() as rig:
        rig.source.tell(service("broken", ports=[]), service("headless", clusterIP="None"), service("fine"), SYNCED)
        await rig.until(rig.controller.ready.is_set)

        rig.source.tell(service("fine-too"))
        await rig.sink.called(2)

        assert [name.service.name for name in rig.sink.states[-1].service_ports] == ["fine", "fine-too"]
        assert len(rig.tracker.problems) == 1


async def test_nothing_is_synced_again_while_nothing_changes() -> None:
    async with Rig().running() as rig:
        rig.source.tell(service(), SYNCED)
        await rig.until(rig.controller.ready.is_set)

        await asyncio.sleep(0.03)

        assert rig.controller.syncs == len(rig.sink.states) == 1


async def test_the_callback_after_a_sync_is_called_for_successes_only() -> None:
    calls: list[int] = []
    rig = Rig(after_sync=lambda: calls.append(len(rig.sink.states)))
    async with rig.running():
        rig.sink.refusal = "no"
        rig.source.tell(SYNCED)
        await rig.sink.called(2)
        assert calls == []

        rig.sink.refusal = ""
        await rig.until(lambda: calls)

        assert calls == [len(rig.sink.states)]


async def test_an_unexpected_failure_is_logged_with_its_traceback() -> None:
    def broken() -> None:
        raise ZeroDivisionError

    rig = Rig(after_sync=broken)
    rig.source.tell(SYNCED)

    with pytest.raises(ExceptionGroup) as caught:
        await asyncio.wait_for(rig.controller.run(), _BOUND_S)

    assert caught.group_contains(ZeroDivisionError)


async def test_the_minimum_period_begins_with_a_load_of_rules_only() -> None:
    rig = Rig()
    pacer = Pacer(asyncio.get_running_loop().time, min_period_s=3_600, max_retry_s=0.01)
    rig.controller = Controller(rig.source, rig.tracker, [rig.sink], pacer, loads=lambda: 0)
    async with rig.running():
        for syncs in (1, 2, 3):
            rig.source.tell(service(f"web-{syncs}"), SYNCED)
            await rig.sink.called(syncs)


async def test_a_source_that_fails_is_retried_and_its_objects_stay() -> None:
    class FailingOnce(FakeSource):
        def __init__(self) -> None:
            super().__init__()
            self.failed = asyncio.Event()

        async def events(self) -> AsyncIterator[Sequence[ObjectEvent]]:
            yield await self._batches.get()
            if not self.failed.is_set():
                self.failed.set()
                raise RuntimeError("a bug")

    rig = Rig()
    rig.source = source = FailingOnce()
    rig.controller = Controller(source, rig.tracker, [rig.sink], Pacer(lambda: 0.0, 0, 0.01))
    running = asyncio.create_task(rig.controller.run())
    source.tell(service("a"), SYNCED)
    await rig.sink.called(1)
    await asyncio.wait_for(source.failed.wait(), _BOUND_S)

    source.tell(service("b"))
    await rig.sink.called(2)

    assert len(rig.sink.states[-1].service_ports) == 2
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_first_services_are_counted_and_then_each_change_of_endpoints_is_one_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "userspace_proxy.control.controller")
    two_ports = [{"port": 80, "name": "a"}, {"port": 81, "name": "b"}]
    async with Rig().running() as rig:
        rig.source.tell(service(), service("more", ports=two_ports), endpoint_slice("10.0.0.1"), SYNCED)
        await rig.until(rig.controller.ready.is_set)
        rig.source.tell(endpoint_slice("10.0.0.2", "10.0.0.3"))
        await rig.until(lambda: len(caplog.messages) > 1)
        rig.source.tell(gone("Service", "web"))
        await rig.until(lambda: len(caplog.messages) > 2)

    assert caplog.messages == [
        "ready: 2 Services with 3 service ports, 2 of them without endpoints",
        "default/web: 2 endpoints, 2 ready; added 10.0.0.2:8080, 10.0.0.3:8080; removed 10.0.0.1:8080",
        "default/web: 0 endpoints, 0 ready; removed 10.0.0.2:8080, 10.0.0.3:8080",
    ]
