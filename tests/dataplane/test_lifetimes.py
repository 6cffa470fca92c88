"""Connection policies: real connections whose endpoint is removed, that grow old, or that wait for an endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tracemalloc
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

import pytest

from tests.dataplane.test_tcp import Listener, all_ended, dial
from tests.dataplane.world import LISTENER, PORTAL6, VANISHING_IPS, Plane, named_backends, running_plane, vanished
from tests.ends import PATIENCE_S, End, until
from userspace_proxy.dataplane import lifetimes, slices
from userspace_proxy.dataplane.connections import Limits
from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.listeners import Backends
from userspace_proxy.model.service import ConnectionPolicy

RESET = ConnectionPolicy(drain_s=0.0)
OTHER = Endpoint("127.0.0.1", 9)
# Of all times of `lifetimes`: an idle connection is one of 0.2 s here.
SCALE = 0.2


@pytest.fixture(autouse=True)
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifetimes, "IDLE_S", lifetimes.IDLE_S * SCALE)
    monkeypatch.setattr(lifetimes, "PERIOD_S", lifetimes.PERIOD_S * SCALE)


@pytest.fixture
async def plane() -> AsyncIterator[Plane]:
    async with running_plane() as running:
        yield running


async def works(client: End, backend: End) -> None:
    await client.send(b"question")
    assert await backend.receive(8) == b"question"
    await backend.send(b"answer")
    assert await client.receive(6) == b"answer"


async def ended(plane: Plane) -> str:
    """Wait until the only connection has ended; return how."""
    await until(lambda: bool(plane.records), "the connection ends", PATIENCE_S)
    (record,) = plane.records
    return record.how


# ---- removed endpoints

REMOVALS: dict[str, Callable[[Endpoint], Endpoint] | None] = {
    "removed": None,
    "terminating": lambda endpoint: replace(endpoint, ready=False, terminating=True),
    "not ready": lambda endpoint: replace(endpoint, ready=False, serving=False),
}


@pytest.mark.parametrize("policy", [ConnectionPolicy(), ConnectionPolicy(drain_s=60.0), RESET])
@pytest.mark.parametrize("kind", REMOVALS)
async def test_connections_to_a_removed_endpoint_follow_the_policy(
    plane: Plane, kind: str, policy: ConnectionPolicy
) -> None:
    with Listener() as listener:
        await plane.apply(policy)
        await plane.use(listener.endpoint)
        client = await dial()
        backend = await listener.accept()
        await works(client, backend)

        changed = REMOVALS[kind]
        left = [changed(listener.endpoint)] if changed else []
        await plane.use(OTHER, serving=[OTHER, *(endpoint for endpoint in left if endpoint.serving)])

        if policy == RESET:
            assert await client.receive_all() == (b"", "reset")
            assert await backend.receive_all() == (b"", "reset")
            assert await ended(plane) == "reset by on-endpoint-removal"
        else:
            await works(client, backend)
        client.close()
        backend.close()
        await all_ended(plane)
        assert (await plane.counters()).closed_by_removal == (policy == RESET)


async def test_the_connections_of_a_removed_endpoint_let_packets_through_between_their_resets(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifetimes, "LEAVING_S", 0.0)
    with Listener() as listener:
        await plane.apply(RESET)
        await plane.use(listener.endpoint)
        pairs = [(await dial(), await listener.accept()) for _ in range(3)]
        for client, backend in pairs:
            await works(client, backend)

        plane.local.listeners[LISTENER].update(Backends((OTHER,), (OTHER,)))

        assert len(plane.records) == 1
        for client, backend in pairs:
            assert await client.receive_all() == (b"", "reset")
            client.close()
            backend.close()


async def test_a_ready_endpoint_that_hints_lead_elsewhere_keeps_its_connections(plane: Plane) -> None:
    with Listener() as listener:
        await plane.apply(RESET)
        await plane.use(listener.endpoint)
        client = await dial()
        backend = await listener.accept()
        await plane.use(OTHER, serving=[OTHER, listener.endpoint])
        await works(client, backend)
        client.close()
        backend.close()


@pytest.mark.parametrize("is_idle", [True, False])
async def test_after_the_drain_an_idle_connection_is_closed_and_a_busy_one_is_reset(
    plane: Plane, is_idle: bool
) -> None:
    with Listener() as listener:
        await plane.apply(ConnectionPolicy(drain_s=2 * lifetimes.IDLE_S))
        await plane.use(listener.endpoint)
        client = await dial()
        backend = await listener.accept()
        await works(client, backend)
        if not is_idle:
            await asyncio.sleep(0.05)  # the kernel's clock has moved on since the answer
            await client.send(b"a question that is not answered")
        await plane.use(OTHER)

        assert (await client.receive_all())[1] == ("eof" if is_idle else "reset")
        how = await ended(plane)
        assert how == f"{'closed' if is_idle else 'reset'} by on-endpoint-removal"
        client.close()
        backend.close()


async def test_an_endpoint_that_returns_in_time_keeps_its_connections(plane: Plane) -> None:
    with Listener() as listener, Listener() as leaving:
        await plane.apply(ConnectionPolicy(drain_s=0.2))
        await plane.use(listener.endpoint, leaving.endpoint)
        pairs = [(await dial(), await each.accept()) for each in (listener, leaving)]
        await plane.use(OTHER)
        await plane.use(OTHER, listener.endpoint)
        (client, backend), (gone, lost) = pairs
        await gone.receive_all()
        await works(client, backend)
        for end in (client, backend, gone, lost):
            end.close()


async def test_a_client_whose_endpoint_is_removed_while_it_is_dialled_gets_another_one(plane: Plane) -> None:
    with Listener(VANISHING_IPS[0]) as silent, Listener() as good, vanished(VANISHING_IPS[0]):
        await plane.apply(RESET)
        await plane.use(silent.endpoint)
        client = await dial()
        async with asyncio.timeout(PATIENCE_S):
            while not await plane.connections_open():
                await asyncio.sleep(0.01)
        await plane.use(good.endpoint)
        backend = await good.accept()
        await works(client, backend)
        client.close()
        backend.close()
        await all_ended(plane)
        assert [record.endpoint for record in plane.records] == [good.endpoint]


async def test_a_change_of_the_policy_concerns_later_removals_alone(plane: Plane) -> None:
    with Listener() as first, Listener() as second:
        await plane.use(first.endpoint, second.endpoint)
        (kept, its), (cut, other) = [(await dial(), await each.accept()) for each in (first, second)]
        await plane.use(second.endpoint)
        await plane.apply(RESET)
        await works(kept, its)
        await works(cut, other)
        await plane.use(OTHER)
        assert await cut.receive_all() == (b"", "reset")
        await works(kept, its)
        for end in (kept, its, cut, other):
            end.close()


# ---- old connections


def has_ended(client: End) -> bool:
    try:
        return client.sock.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False


class Asker:
    """A client that pauses between requests, and dials again if its connection was closed in a pause.

    It also dials again if a busy machine made the pause longer than *pause_s*: a request would cross the FIN then.
    """

    def __init__(self) -> None:
        self.asked = self.answers = self.closed = 0

    async def run(self, requests: int, pause_s: float, delay_s: float) -> None:
        """Send *requests*, and more until the connection has been closed once."""
        now = asyncio.get_running_loop().time
        await asyncio.sleep(delay_s)
        client = await dial()
        give_up_at, is_late = now() + PATIENCE_S, False
        while self.asked < requests or (not self.closed and now() < give_up_at):
            if (was_closed := has_ended(client)) or is_late:
                self.closed += was_closed
                client.close()
                client = await dial()
            self.asked += 1
            await client.send(b"question")
            with contextlib.suppress(ConnectionError):
                self.answers += await client.receive(6) == b"answer"
            ends_at = now() + pause_s
            await asyncio.sleep(pause_s)
            is_late = now() > ends_at + lifetimes.IDLE_S / 10
        client.close()


@contextlib.asynccontextmanager
async def answering() -> AsyncIterator[Endpoint]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while await reader.read(8):
                writer.write(b"answer")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield Endpoint(*server.sockets[0].getsockname()[:2])


async def test_clients_that_pause_see_no_error_from_the_maximum_age(plane: Plane) -> None:
    """Each client pauses for twice the idle time, each at a different moment."""
    askers = [Asker() for _ in range(100)]
    async with answering() as endpoint:
        await plane.apply(ConnectionPolicy(max_age_s=0.5))
        await plane.use(endpoint)
        pause_s = 2 * lifetimes.IDLE_S
        await asyncio.gather(*(asker.run(5, pause_s, pause_s * i / len(askers)) for i, asker in enumerate(askers)))
        await all_ended(plane)
        counters = await plane.counters()

    assert [asker.answers for asker in askers] == [asker.asked for asker in askers]
    assert sum(asker.closed for asker in askers) >= len(askers)
    assert counters.closed_by_age >= len(askers)
    assert {record.how for record in plane.records} == {"closed", "closed by max-connection-age"}


async def test_a_maximum_age_concerns_open_connections_and_spares_busy_ones(plane: Plane) -> None:
    with Listener() as listener:
        await plane.use(listener.endpoint)
        pairs = [(await dial(), await listener.accept()) for _ in range(3)]
        (idle, its), (busy, other), (half, answering_late) = pairs
        for pair in pairs:
            await works(*pair)
        await half.send(b"question")
        half.half_close()
        assert await answering_late.receive_all() == (b"question", "eof")
        await plane.apply(ConnectionPolicy(max_age_s=0.1))

        is_closed = asyncio.create_task(idle.receive_all())
        while not is_closed.done():
            await works(busy, other)
            await asyncio.sleep(lifetimes.IDLE_S / 10)
        assert is_closed.result() == (b"", "eof")
        assert await its.receive_all() == (b"", "eof")
        await answering_late.send(b"answer")
        assert await half.receive(6) == b"answer"
        for pair in pairs:
            for end in pair:
                end.close()


async def test_a_connection_that_waits_for_an_answer_is_not_idle(plane: Plane) -> None:
    with Listener() as listener:
        await plane.apply(ConnectionPolicy(max_age_s=0.05))
        await plane.use(listener.endpoint)
        client = await dial()
        backend = await listener.accept()
        await client.send(b"question")
        await backend.receive(8)
        await asyncio.sleep(4 * lifetimes.IDLE_S)
        await backend.send(b"answer")
        assert await client.receive_all() == (b"answer", "eof")
        client.close()
        backend.close()


async def test_a_busy_connection_is_reset_after_the_time_for_force(plane: Plane) -> None:
    with Listener() as listener:
        await plane.apply(ConnectionPolicy(max_age_s=0.1, force_s=0.3))
        await plane.use(listener.endpoint)
        client = await dial()
        backend = await listener.accept()
        with contextlib.suppress(OSError):
            async with asyncio.timeout(PATIENCE_S):
                while not plane.records:
                    await works(client, backend)
                    await asyncio.sleep(lifetimes.IDLE_S / 10)
        assert await ended(plane) == "reset by max-connection-age"
        client.close()
        backend.close()


# ---- connections without an endpoint

WAIT = ConnectionPolicy(wait_s=60.0)


async def waiting(plane: Plane, count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while (await plane.counters()).waiting != count:
            await asyncio.sleep(0.01)


async def test_500_clients_of_an_empty_service_are_served_when_an_endpoint_comes(plane: Plane) -> None:
    await plane.apply(WAIT)
    await plane.use()
    tracemalloc.start()
    try:
        clients = [await dial() for _ in range(500)]
        await waiting(plane, 500)
        taken = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*/userspace_proxy/*")])
        assert sum(stat.size for stat in taken.statistics("filename")) / 500 < 2048
    finally:
        tracemalloc.stop()
    await clients[0].send(b"sent before there was an endpoint")
    with named_backends("a") as (a,):
        await plane.use(a.endpoint)
        for client in clients[1:]:
            assert await client.receive_all() == (b"a", "eof")
        for client in clients:
            client.close()
        await all_ended(plane)
    counters = await plane.counters()

    assert (counters.waiting, counters.waits_released, counters.failed) == (0, 500, 0)
    assert {record.why for record in plane.records} == {"round robin, after a wait"}


async def test_bytes_that_a_waiting_client_has_sent_reach_the_endpoint(plane: Plane) -> None:
    await plane.apply(WAIT)
    await plane.use()
    client = await dial()
    await client.send(b"question")
    await waiting(plane, 1)
    with Listener() as listener:
        await plane.use(listener.endpoint)
        backend = await listener.accept()
        assert await backend.receive(8) == b"question"
        await works(client, backend)
        client.close()
        backend.close()


async def test_a_client_for_which_no_endpoint_comes_is_reset_in_time(plane: Plane) -> None:
    await plane.apply(ConnectionPolicy(wait_s=0.1))
    await plane.use()
    client = await dial()
    assert await client.receive_all() == (b"", "reset")
    client.close()
    assert await ended(plane) == "no endpoint came in time"
    counters = await plane.counters()
    assert (counters.waits_expired, counters.failed, counters.waiting) == (1, 1, 0)


async def test_clients_for_which_no_endpoint_comes_let_packets_through_between_their_resets(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others end in between, and not twice."""
    monkeypatch.setattr(slices, "SLICE_S", 0.0)

    def cut_soon() -> None:
        asyncio.get_running_loop().call_soon(plane.local.cut)

    plane.on_record = cut_soon
    await plane.apply(ConnectionPolicy(wait_s=0.1))
    await plane.use()
    clients = [await dial() for _ in range(3)]
    for client in clients:
        assert await client.receive_all() == (b"", "reset")
        client.close()
    counters = await plane.counters()
    assert (counters.waits_expired, counters.waiting, counters.open) == (1, 0, 0)


async def test_a_cut_resets_clients_that_wait(plane: Plane) -> None:
    await plane.apply(WAIT)
    await plane.use()
    client = await dial()
    await waiting(plane, 1)

    plane.local.cut()

    assert await client.receive_all() == (b"", "reset")
    client.close()


@pytest.mark.parametrize("leaves", ["close", "reset"])
async def test_a_waiting_client_that_leaves_frees_its_place(
    plane: Plane, leaves: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifetimes, "WAITING_MAX", 1)
    await plane.apply(WAIT)
    await plane.use()
    first = await dial()
    await waiting(plane, 1)
    second = await dial()
    assert await second.receive_all() == (b"", "reset"), "there is one place"
    second.close()
    await first.send(b"question")
    getattr(first, leaves)()
    await waiting(plane, 0)
    third = await dial()
    await waiting(plane, 1)
    third.close()
    await waiting(plane, 0)
    counters = await plane.counters()
    assert (counters.waits_abandoned, counters.open) == (2, 0)


async def test_a_client_waits_for_an_endpoint_of_its_family(plane: Plane) -> None:
    await plane.apply(WAIT)
    await plane.use()
    client = await dial(PORTAL6)
    await waiting(plane, 1)
    with named_backends("a") as (a,), Listener("::1") as listener:
        await plane.use(a.endpoint)
        await waiting(plane, 1)
        await plane.use(a.endpoint, listener.endpoint)
        backend = await listener.accept()
        await works(client, backend)
        client.close()
        backend.close()


async def test_a_closed_listener_and_a_drain_release_waiting_clients() -> None:
    async with running_plane(Limits()) as plane:
        await plane.apply(WAIT)
        await plane.use()
        client = await dial()
        await waiting(plane, 1)
        await plane.local.retire([LISTENER])
        assert await client.receive_all() == (b"", "reset")
        client.close()
        assert await ended(plane) == "service gone"
