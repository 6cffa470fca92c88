"""The reflector, over real sockets, against an API server with the faults of real ones."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Any

import aiohttp
import msgspec
import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.apiserver import SERVICES, ApiServer, Fault, Refusal, api_server
from userspace_proxy import api
from userspace_proxy.sources.login import StreamedResponse
from userspace_proxy.sources.reflector import Pace, Reflector
from userspace_proxy.sources.transport import Response

PATIENCE_S = 10
# As in life, only quicker.
QUICK = Pace(
    silence_s=0.4,
    answer_s=0.5,
    watch_s=(5, 9),
    good_s=0.1,
    retry_s=0.02,
    refused_max_s=0.1,
    unreachable_max_s=0.05,
    cut_max_s=0.05,
    again_s=0.01,
)


def service(name: str, port: int = 80, labels: Mapping[str, str] = {}) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "namespace": "default", "labels": dict(labels)},
        "spec": {"ports": [{"port": port}]},
    }


class PlainTransport:
    """HTTP without any login."""

    def __init__(self, server: ApiServer, session: aiohttp.ClientSession) -> None:
        self._server = server
        self._session = session
        self.token = ""

    @contextlib.asynccontextmanager
    async def get(self, path: str, params: Mapping[str, str]) -> AsyncGenerator[Response]:
        headers = {"Authorization": f"Bearer {self.token}"}
        timeout = aiohttp.ClientTimeout(total=None)
        try:
            answer = await self._session.get(self._server.url + path, params=params, headers=headers, timeout=timeout)
        except aiohttp.ClientError as error:
            raise ConnectionError(str(error)) from error
        async with answer:
            yield StreamedResponse(answer)


class Follower:
    """Follows Services and holds the reported ones: name -> port."""

    def __init__(self, server: ApiServer, session: aiohttp.ClientSession, params: Mapping[str, str], seed: int) -> None:
        self.server = server
        self.transport = PlainTransport(server, session)
        self.waits: list[float] = []
        self.reflector = Reflector(
            "services",
            SERVICES,
            params,
            msgspec.json.Decoder(api.Service),
            self.transport,
            pace=QUICK,
            chance=random.Random(seed),
            sleep=self._sleep,
        )
        self.batches = 0
        self.told: list[tuple[str, int | None]] = []
        self.ports: dict[str, int] = {}
        self._heard = asyncio.Event()

    async def _sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        await asyncio.sleep(seconds)

    async def follow(self) -> None:
        async with contextlib.aclosing(self.reflector.changes()) as batches:
            async for batch in batches:
                self.batches += 1
                for name, given in batch:
                    assert isinstance(given, api.Service | None)
                    if given is None:
                        del self.ports[name.name]
                        self.told.append((name.name, None))
                    else:
                        assert given.spec is not None
                        assert given.spec.ports is not None
                        self.ports[name.name] = given.spec.ports[0].port
                        self.told.append((name.name, self.ports[name.name]))
                self._heard.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._heard.wait(), 0.01)
                self._heard.clear()

    async def has_stood(self) -> None:
        """Wait until the watch has lasted for as long as a good one does."""
        await self.until(lambda: self.server.watching[SERVICES] > 0)
        await asyncio.sleep(2 * QUICK.good_s)

    @property
    def truth(self) -> dict[str, int]:
        return {name: o["spec"]["ports"][0]["port"] for (_, name), o in self.server.kinds[SERVICES].objects.items()}

    async def converged(self) -> None:
        """Wait until the reported Services are the server's, and check that they stay so."""
        await self.until(lambda: self.ports == self.truth)


@contextlib.asynccontextmanager
async def following(
    server: ApiServer, params: Mapping[str, str] | None = None, seed: int = 1, *, listed: bool = True
) -> AsyncIterator[Follower]:
    async with aiohttp.ClientSession() as session:
        follower = Follower(server, session, params or {}, seed)
        task = asyncio.create_task(follower.follow())
        try:
            if listed:
                await follower.until(lambda: follower.batches > 0 or task.done())
            yield follower
        finally:
            task.cancel()
            (ended,) = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(ended, asyncio.CancelledError), ended


@pytest.fixture(params=["watch-list", "list"])
async def server(request: pytest.FixtureRequest) -> AsyncIterator[ApiServer]:
    """A server that streams the list in a watch, and one that lists only page by page."""
    async with api_server() as running:
        running.knows_watch_list = request.param == "watch-list"
        running.page_objects_max = 2
        yield running


# ---- all well


async def test_the_first_batch_holds_all_objects(server: ApiServer) -> None:
    for index in range(5):
        await server.put(SERVICES, service(f"s{index}", index + 1))

    async with following(server) as follower:
        assert follower.batches == 1
        assert follower.ports == follower.truth
        assert follower.reflector.stats.failing_since is None


async def test_an_empty_cluster_yields_synced(server: ApiServer) -> None:
    async with following(server) as follower:
        assert (follower.batches, follower.ports) == (1, {})


async def test_each_change_is_yielded(server: ApiServer) -> None:
    async with following(server) as follower:
        await server.put(SERVICES, service("a"))
        await server.put(SERVICES, service("b"))
        await server.put(SERVICES, service("a", 81))
        await server.delete(SERVICES, "b")
        await follower.until(lambda: len(follower.told) == 4)

        assert follower.told == [("a", 80), ("b", 80), ("a", 81), ("b", None)]


async def test_a_pod_that_is_no_longer_selected_is_no_endpoint(server: ApiServer) -> None:
    async with following(server, {"labelSelector": "!other-proxy"}) as follower:
        await server.put(SERVICES, service("a"))
        await follower.until(lambda: follower.ports == {"a": 80})
        await server.put(SERVICES, service("a", labels={"other-proxy": "x"}))
        await follower.until(lambda: follower.ports == {})


async def test_objects_of_five_megabytes_pass(server: ApiServer) -> None:
    big = service("big")
    big["metadata"]["annotations"] = {"padding": "x" * (5 << 20)}
    async with following(server) as follower:
        await server.put(SERVICES, big)
        await follower.until(lambda: follower.ports == {"big": 80})


async def test_a_watch_that_ends_regularly_is_continued_at_its_last_version(server: ApiServer) -> None:
    async with following(server) as follower:
        await server.put(SERVICES, service("a"))
        await follower.until(lambda: follower.ports == {"a": 80})
        server.faults.append(Fault.END)
        await server.put(SERVICES, service("b"))
        await follower.converged()

        assert follower.reflector.stats.relists == 1
        assert follower.told == [("a", 80), ("b", 80)]


async def test_a_reflector_has_at_most_one_watch(server: ApiServer) -> None:
    async with following(server) as follower:
        for index in range(6):
            server.faults.append(Fault.RESET if index % 2 else Fault.END)
            await server.put(SERVICES, service("a", index + 1))
            await follower.converged()

        assert server.most_watching[SERVICES] == 1


# ---- misfortunes


@pytest.mark.parametrize("fault", list(Fault))
async def test_a_reflector_recovers_from_any_fault(server: ApiServer, fault: Fault) -> None:
    await server.put(SERVICES, service("a"))
    await server.put(SERVICES, service("b"))
    async with following(server) as follower:
        server.faults += [fault, fault]
        await server.put(SERVICES, service("a", 81))
        await server.delete(SERVICES, "b")
        await server.put(SERVICES, service("c"))
        await follower.converged()

        assert follower.ports == {"a": 81, "c": 80}


async def test_an_object_deleted_while_disconnected_is_deleted_by_the_next_list(server: ApiServer) -> None:
    await server.put(SERVICES, service("a"))
    await server.put(SERVICES, service("b"))
    async with following(server) as follower:
        server.faults.append(Fault.RESET)
        await server.delete_unseen(SERVICES, "a")
        await follower.converged()

        assert follower.told[-1] == ("a", None)
        assert follower.reflector.stats.expired == 1
        assert follower.reflector.stats.relists == 2


async def test_a_lost_server_deletes_no_object(server: ApiServer) -> None:
    await server.put(SERVICES, service("a"))
    async with following(server) as follower:
        await server.stop()
        await follower.until(lambda: follower.reflector.stats.failing_since is not None)
        assert follower.ports == {"a": 80}
        assert follower.reflector.stats.why

        await server.put(SERVICES, service("b"))
        await server.start()
        await follower.converged()
        await follower.until(lambda: follower.reflector.stats.failing_since is None)


async def test_a_balancer_that_cuts_quiet_watches_again_and_again_is_no_failure(
    server: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    """HAProxy's usual time-out is less than the minute between two bookmarks."""
    async with following(server) as follower:
        stats = follower.reflector.stats
        for name in "abc":
            await follower.has_stood()
            restarts = stats.restarts
            server.cut()
            await follower.until(lambda restarts=restarts: stats.restarts > restarts)  # type: ignore[misc]
            assert stats.failing_since is None
            await server.put(SERVICES, service(name))
            await follower.converged()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


class CutLists:
    """A server that cuts each watch before it has told what is there, after it has stood for a while."""

    status, headers = 200, dict[str, str]()

    @contextlib.asynccontextmanager
    async def get(self, path: str, params: Mapping[str, str]) -> AsyncGenerator[Response]:
        yield self

    async def chunks(self) -> AsyncGenerator[bytes]:
        yield b"\n"
        await asyncio.sleep(2 * QUICK.good_s)
        raise ConnectionResetError("cut by the test")


async def test_a_list_that_is_cut_again_and_again_is_a_failure() -> None:
    decoder = msgspec.json.Decoder(api.Service)
    reflector = Reflector("services", SERVICES, {}, decoder, CutLists(), pace=QUICK, chance=random.Random(1))
    reading = asyncio.ensure_future(anext(reflector.changes()))
    async with asyncio.timeout(PATIENCE_S):
        while "cut by the test" not in reflector.stats.why:
            await asyncio.sleep(0.01)
    reading.cancel()
    await asyncio.wait([reading])


async def test_a_silent_watch_is_detected(server: ApiServer) -> None:
    async with following(server) as follower:
        server.bookmark_s = 60.0
        server.cut()
        await follower.until(lambda: "nothing was heard" in follower.reflector.stats.why)
        stats = follower.reflector.stats
        assert stats.failing_since == stats.heard_at
        restarts = stats.restarts
        await follower.until(lambda: stats.restarts > restarts)
        assert stats.failing_since is not None, "a new connection is no word"

        await server.put(SERVICES, service("a"))
        await follower.converged()
        assert stats.failing_since is None


async def test_a_silence_is_over_where_a_balancer_cuts_each_watch_before_its_first_bookmark(server: ApiServer) -> None:
    async with following(server) as follower:
        stats = follower.reflector.stats
        server.bookmark_s = 60.0
        server.cut()
        await follower.until(lambda: "nothing was heard" in stats.why)

        async def cut_quiet_watches() -> None:
            while True:
                await asyncio.sleep(2 * QUICK.good_s)
                server.cut()

        cutting = asyncio.create_task(cut_quiet_watches())
        try:
            await follower.until(lambda: stats.failing_since is None)
        finally:
            cutting.cancel()


async def test_a_server_that_never_answers_is_detected(server: ApiServer) -> None:
    server.is_frozen = True
    async with following(server, listed=False) as follower:
        await follower.until(lambda: "does not answer" in follower.reflector.stats.why)
        server.is_frozen = False
        await follower.until(lambda: follower.batches > 0)


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
async def test_a_refused_request_is_retried_and_logged(server: ApiServer, status: int) -> None:
    async with following(server) as follower:
        server.refusals += [Refusal(status)] * 4
        server.cut()
        await follower.until(lambda: follower.reflector.stats.why == f"{status} refused by the test")
        await server.put(SERVICES, service("a"))
        await follower.converged()


async def test_a_server_that_names_a_time_is_not_asked_before_it(server: ApiServer) -> None:
    async with following(server) as follower:
        server.refusals.append(Refusal(429, {"Retry-After": "1"}))
        server.cut()
        await follower.until(lambda: not server.refusals)
        await follower.until(lambda: max(follower.waits) >= QUICK.refused_max_s)


async def test_expired_credentials_are_distinguished_from_a_server_that_is_down(server: ApiServer) -> None:
    """The first 401 is answered at once: the transport has read its credentials again by then."""
    server.token = "first"
    async with following(server, listed=False) as follower:
        follower.transport.token = "first"
        await follower.has_stood()
        waits = len(follower.waits)
        server.token = follower.transport.token = "second"
        server.refusals.append(Refusal(401))
        server.faults.append(Fault.END)
        await server.put(SERVICES, service("a"))
        await follower.converged()

        assert 0.0 in follower.waits[waits:]
        assert follower.reflector.stats.failing_since is None


async def test_a_cluster_restored_from_a_backup_is_followed(server: ApiServer) -> None:
    await server.put(SERVICES, service("a"))
    await server.put(SERVICES, service("b"))
    async with following(server) as follower:
        await server.stop()
        server.version = 100
        server.kinds[SERVICES].objects.clear()
        server.kinds[SERVICES].history.clear()
        await server.put(SERVICES, service("a", 8080))
        await server.start()
        await follower.converged()

        assert follower.ports == {"a": 8080}


async def test_a_list_that_expires_between_two_pages_is_requested_again_as_a_whole(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with api_server() as server:
        server.knows_watch_list = False
        server.page_objects_max = 2
        for index in range(5):
            await server.put(SERVICES, service(f"s{index}"))
        server._pages = ForgetfulPages()

        async with following(server, listed=False) as follower:
            await follower.until(lambda: any(not p.get("limit") for _, p in server.requests if "watch" not in p))
            server.page_objects_max = 500
            await follower.converged()


class ForgetfulPages(dict[str, Any]):
    """Forgets every page."""

    def __contains__(self, _: object) -> bool:
        return False


async def test_an_object_that_makes_no_sense_stops_no_other_and_keeps_its_last_good_version(
    server: ApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    await server.put(SERVICES, service("a"))
    async with following(server) as follower:
        await server.put(SERVICES, {"metadata": {"name": "a", "namespace": "default"}, "spec": {"ports": 7}})
        await server.put(SERVICES, service("b"))
        await follower.until(lambda: follower.ports == {"a": 80, "b": 80})
        (said,) = follower.reflector.problems.values()
        assert "services default/a" in said

        await server.put(SERVICES, service("a", 81))
        await follower.until(lambda: follower.ports == {"a": 81, "b": 80})
        await follower.until(lambda: not follower.reflector.problems)


async def test_a_second_reader_gets_every_object_again(server: ApiServer) -> None:
    await server.put(SERVICES, service("a"))
    async with following(server) as follower:
        await server.put(SERVICES, service("b"))
        await follower.converged()
        async with contextlib.aclosing(follower.reflector.changes()) as again:
            first = await anext(again)

        assert sorted(name.name for name, _ in first) == ["a", "b"]


# ---- any history


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, Any]]:
    names = st.sampled_from(["a", "b", "c", "d"])
    write = st.one_of(
        st.tuples(st.just("put"), st.tuples(names, st.integers(1, 9))),
        st.tuples(st.just("delete"), names),
    )
    fault = st.tuples(st.just("fault"), st.sampled_from([fault for fault in Fault if fault is not Fault.SILENCE]))
    steps = st.one_of(
        write,
        write,
        fault,
        fault,
        st.tuples(st.just("refuse"), st.sampled_from([401, 410, 429, 500])),
        st.tuples(st.sampled_from(["compact", "cut", "restart", "pause", "pause"]), st.none()),
    )
    return [*draw(st.lists(steps, min_size=10, max_size=30)), draw(fault), ("pause", None), draw(write)]


async def live_through(server: ApiServer, history: list[tuple[str, Any]]) -> None:
    for step, given_ in history:
        match step:
            case "put":
                await server.put(SERVICES, service(*given_))
            case "delete" if ("default", given_) in server.kinds[SERVICES].objects:
                await server.delete(SERVICES, given_)
            case "fault":
                server.faults.append(given_)
            case "refuse":
                server.refusals.append(Refusal(given_))
            case "compact":
                server.compact()
            case "cut":
                server.cut()
            case "restart":
                await server.stop()
                await server.start()
            case "pause":
                await asyncio.sleep(0.03)


@pytest.mark.parametrize("factory", [uvloop.new_event_loop, asyncio.new_event_loop], ids=["uvloop", "asyncio"])
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(history=histories(), watch_list=st.booleans(), seed=st.integers(0, 99))
def test_any_history_of_faults_ends_with_the_servers_objects(
    factory: Callable[[], asyncio.AbstractEventLoop], history: list[tuple[str, Any]], watch_list: bool, seed: int
) -> None:
    async def check() -> None:
        async with api_server() as server:
            server.knows_watch_list, server.page_objects_max, server.bookmark_s = watch_list, 2, 0.05
            await server.put(SERVICES, service("a"))
            async with following(server, seed=seed) as follower:
                await live_through(server, history)
                server.faults.clear()
                server.refusals.clear()
                await follower.converged()
                await asyncio.sleep(3 * server.bookmark_s)  # nothing that is still under way changes it
                assert follower.ports == follower.truth
                assert server.most_watching[SERVICES] == 1

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(check())
