"""From one process to the next: upgrades, deaths, and which processes may take over; no client notices."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.net.world import (
    POD1,
    POD2,
    Proxy,
    answers,
    background_requests,
    documents,
    endpoints,
    open_connection,
    serve_web,
    service,
    take_port,
    told,
    traces,
    udp_socket,
    wait_until,
)
from userspace_proxy.dataplane.handover import (
    VERSION,
    Conversation,
    Inherit,
    Lock,
    Present,
    Released,
    Taken,
    TakeOver,
    expect,
)
from userspace_proxy.dataplane.rendezvous import Caller, Role, answer, heard, join
from userspace_proxy.dataplane.sockets import open_listener
from userspace_proxy.dataplane.wire import Open
from userspace_proxy.lab import ServiceLab, ask
from userspace_proxy.model.listeners import ListenerSpec
from userspace_proxy.model.names import L4Protocol, NamespacedName, ServicePortName
from userspace_proxy.model.service import ServicePort

WEB = "10.96.4.1"
NAME = "\0userspace-proxy"


@pytest.fixture
def second(fresh_proxy: Proxy, tmp_path: Path) -> Iterator[Proxy]:
    """Another process over the same manifests."""
    other = Proxy(fresh_proxy.world, tmp_path)
    other.log_file = tmp_path / "second.log"
    yield other
    if other.process is not None and other.process.poll() is None:
        other.process.kill()
        other.process.wait(20)


@contextlib.contextmanager
def no_request_fails(world: ServiceLab, at_least: int = 20) -> Iterator[None]:
    """Send requests from two clients, each on its own connection, while the block runs; all must be answered."""
    with (
        background_requests(lambda: ask(world.client, WEB, timeout_s=5)) as first,
        background_requests(lambda: ask(world.client, WEB, timeout_s=5)) as other,
    ):
        wait_until(lambda: len(first) > at_least, "requests flow")
        yield
        flowed = len(first)
        wait_until(lambda: len(first) > flowed + at_least, "requests still flow")
    assert not [outcome for outcome in first + other if isinstance(outcome, BaseException)]


def has_ended(pid: int) -> bool:
    """Return whether the process is gone or a zombie: in the lab no parent collects it.

    With all its threads: a zombie whose last thread is just ending has its sockets still.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return True
    state, threads = fields[0], fields[17]
    return state == "Z" and int(threads) <= 1


def variants() -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("rules", "loop", "workers"), [("nftables", "uvloop", 1), ("iptables", "asyncio", 1), ("nftables", "uvloop", 2)]
    )


def test_a_start_that_cannot_serve_leaves_the_running_instance_alone(
    fresh_proxy: Proxy, second: Proxy, world: ServiceLab
) -> None:
    serve_web(fresh_proxy)
    fresh_proxy.start()
    world.node.set_knob("ipv4/conf/all/src_valid_mark", 1)
    try:
        second.start("--source-ip", "transparent", wait=False)
        assert second.process is not None
        assert second.process.wait(20) == 1
    finally:
        world.node.set_knob("ipv4/conf/all/src_valid_mark", 0)

    second.wait_logged("clients' addresses cannot be kept")
    assert fresh_proxy.process is not None
    assert fresh_proxy.process.poll() is None
    fresh_proxy.serve("web", WEB, POD2)
    wait_until(lambda: ask(world.client, WEB) == "pod2", "changes are followed still")


@variants()
def test_a_second_run_takes_over_and_the_first_makes_way(
    fresh_proxy: Proxy, second: Proxy, world: ServiceLab, rules: str, loop: str, workers: int
) -> None:
    for proxy in (fresh_proxy, second):
        proxy.rules, proxy.loop = rules, loop
    serve_web(fresh_proxy)
    fresh_proxy.start("--workers", str(workers))
    port = fresh_proxy.proxy_port("default/web:http")

    with no_request_fails(world):
        second.start("--workers", str(workers))
        assert fresh_proxy.process is not None
        assert fresh_proxy.process.wait(20) == 0, "it ends when its connections have"

    assert f"handed over to process {second.process.pid}" in fresh_proxy.log() if second.process else False
    assert second.proxy_port("default/web:http") == port
    fresh_proxy.serve("web", WEB, POD1)
    assert {ask(world.client, WEB) for _ in range(4)} == {"pod1"}, "changes are followed by the second"
    assert second.stop() == 0
    assert not traces(world.node)


def test_an_open_connection_continues_in_its_process(fresh_proxy: Proxy, second: Proxy, world: ServiceLab) -> None:
    with open_connection(fresh_proxy, "--drain-timeout", "0.2s") as sock:
        first = fresh_proxy.process
        assert first is not None

        second.start()
        time.sleep(0.5)

        assert first.poll() is None, "the drain time-out is for stopping: an upgrade has no reason to cut anybody"
        sock.send(b"x")
        assert sock.recv(5) == b"", "the backend has heard it, and closes"
    assert first.wait(20) == 0


def test_a_process_that_has_handed_over_and_drains_does_not_block_later_starts(
    fresh_proxy: Proxy, second: Proxy, world: ServiceLab
) -> None:
    with open_connection(fresh_proxy) as sock:
        first = fresh_proxy.process
        assert first is not None
        second.start()
        assert second.stop() == 0

        fresh_proxy.start()

        assert first.poll() is None
        sock.send(b"x")
        assert sock.recv(5) == b""
    assert first.wait(20) == 0


def test_a_stop_ends_a_process_that_has_handed_over_and_drains(
    fresh_proxy: Proxy, second: Proxy, world: ServiceLab
) -> None:
    with open_connection(fresh_proxy, "--drain-timeout", "0.2s") as sock:
        second.start()

        assert fresh_proxy.stop(signal.SIGTERM) == 0

        with pytest.raises(ConnectionResetError):
            sock.recv(5)
    assert "10.96.4.2" in second.rules_text(), "the rules are the second's"


def test_starting_anew_in_place_keeps_the_process_id_and_every_request(fresh_proxy: Proxy, world: ServiceLab) -> None:
    serve_web(fresh_proxy)
    fresh_proxy.start()
    assert fresh_proxy.process is not None
    worker = fresh_proxy.workers()[0]

    with no_request_fails(world):
        fresh_proxy.process.send_signal(signal.SIGUSR2)
        wait_until(lambda: fresh_proxy.log().count("ready:") == 2, "it is ready again")

    assert fresh_proxy.process.poll() is None
    fresh_proxy.wait_logged("restarting in place")
    wait_until(lambda: fresh_proxy.workers() not in ([], [worker]), "another worker serves")
    wait_until(lambda: not Path(f"/proc/{worker}").exists(), "the worker before has ended and was waited for")
    assert fresh_proxy.stop() == 0
    assert not traces(world.node)


@variants()
def test_a_control_process_that_is_killed_drops_nothing_and_the_next_run_takes_over(
    fresh_proxy: Proxy, world: ServiceLab, rules: str, loop: str, workers: int
) -> None:
    fresh_proxy.rules, fresh_proxy.loop = rules, loop
    serve_web(fresh_proxy)
    fresh_proxy.start("--workers", str(workers))
    before = fresh_proxy.workers()
    rules_before = fresh_proxy.rules_text()

    with no_request_fails(world):
        fresh_proxy.stop(signal.SIGKILL)
        time.sleep(0.5)
        assert not any(map(has_ended, before)), "its workers serve on"
        fresh_proxy.start("--workers", str(workers))

    assert fresh_proxy.rules_text().count("default/web") == rules_before.count("default/web")
    wait_until(lambda: all(map(has_ended, before)), "the workers of the dead one have ended")
    assert fresh_proxy.stop() == 0
    assert not traces(world.node)


def test_affinity_outlives_the_control_process_and_the_hand_over(fresh_proxy: Proxy, world: ServiceLab) -> None:
    sticky = "  sessionAffinity: ClientIP"
    fresh_proxy.apply("web", documents(service("web", WEB, extra=sticky), endpoints("web", POD1, POD2)))
    fresh_proxy.start()
    (pinned,) = {ask(world.client, WEB) for _ in range(3)}

    fresh_proxy.stop(signal.SIGKILL)
    assert {ask(world.client, WEB) for _ in range(3)} == {pinned}
    fresh_proxy.start()
    assert {ask(world.client, WEB) for _ in range(3)} == {pinned}
    assert fresh_proxy.process is not None
    fresh_proxy.process.send_signal(signal.SIGUSR2)
    wait_until(lambda: fresh_proxy.log().count("ready:") == 2, "it is ready again")

    assert {ask(world.client, WEB) for _ in range(3)} == {pinned}


def test_a_datagram_under_way_is_answered_across_a_hand_over(
    fresh_proxy: Proxy, second: Proxy, world: ServiceLab
) -> None:
    """The backend takes its time; by then another process reads from clients."""
    slow = world.pods[0].start(sys.executable, "-c", SLOW_UDP)
    fresh_proxy.apply(
        "slow",
        documents(
            service("slow", "10.96.4.7", "[{name: dns, port: 53, protocol: UDP}]"),
            endpoints("slow", POD1).replace("port: 5353", "port: 9053"),
        ),
    )
    fresh_proxy.start()
    with udp_socket(world.client, "10.96.4.7", 53, timeout_s=5) as sock:
        wait_until(lambda: _udp_round_trip(sock), "the backend is there")
        sock.send(b"slow")

        second.start()

        assert sock.recv(10) == b"slow"
        assert _udp_round_trip(sock), "and the second serves the same client"
    slow.kill()


SLOW_UDP = """
import socket, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
    server.bind(("", 9053))
    while True:
        data, client = server.recvfrom(100)
        time.sleep(2 if data == b"slow" else 0)
        server.sendto(data, client)
"""


def _udp_round_trip(sock: socket.socket) -> bool:
    try:
        sock.send(b"x")
        return sock.recv(10) == b"x"
    except OSError:
        return False


# ---- orphans


def test_orphans_are_taken_over_from_although_one_of_them_has_died(fresh_proxy: Proxy, world: ServiceLab) -> None:
    """Its sockets are closed, so the kernel leads its clients to the other workers, which hold the lock."""
    serve_web(fresh_proxy)
    fresh_proxy.start("--workers", "3")
    workers = fresh_proxy.workers()
    fresh_proxy.stop(signal.SIGKILL)

    os.kill(workers[1], signal.SIGKILL)
    wait_until(lambda: has_ended(workers[1]), "it is dead, and so are the connections that it had")
    with no_request_fails(world):
        fresh_proxy.start("--workers", "3")

    fresh_proxy.wait_logged("1 of 3 workers of the proxy before are gone")
    wait_until(lambda: all(map(has_ended, workers)), "the workers before have ended")


def test_an_orphan_that_hangs_is_ended_by_the_next_run(fresh_proxy: Proxy, world: ServiceLab) -> None:
    """The other worker is taken over, and clients at the sockets of the first are served again."""
    serve_web(fresh_proxy)
    fresh_proxy.start("--workers", "2")
    workers = fresh_proxy.workers()
    os.kill(workers[0], signal.SIGSTOP)
    fresh_proxy.stop(signal.SIGKILL)

    fresh_proxy.start("--workers", "2")

    assert f"worker process {workers[0]} has not answered for" in fresh_proxy.log()
    wait_until(lambda: all(map(has_ended, workers)), "the workers before have ended")
    assert all(ask(world.client, WEB) for _ in range(10))


def test_any_number_of_workers_follows_any_other(fresh_proxy: Proxy, world: ServiceLab) -> None:
    serve_web(fresh_proxy)
    fresh_proxy.start("--workers", "1")
    for workers in (3, 2, 1):
        before = fresh_proxy.process
        assert before is not None
        fresh_proxy.start("--workers", str(workers))

        assert before.wait(20) == 0
        assert len(fresh_proxy.workers()) == workers
        assert {ask(world.client, WEB) for _ in range(4)} == {"pod1", "pod2"}
        assert {ask(world.node, WEB) for _ in range(4)} == {"pod1", "pod2"}


def test_a_control_process_that_is_killed_before_its_first_rules_leaves_no_name_and_no_listener_for_long(
    fresh_proxy: Proxy, world: ServiceLab
) -> None:
    """At any moment the next run starts: it takes over the serving process, or none."""
    serve_web(fresh_proxy)
    for delay_s in (0.1, 0.3, 0.4, 0.5, 0.6, 0.8):
        fresh_proxy.start(wait=False)
        time.sleep(delay_s)
        fresh_proxy.stop(signal.SIGKILL)
    fresh_proxy.start()

    assert {ask(world.client, WEB) for _ in range(4)} == {"pod1", "pod2"}
    assert fresh_proxy.stop() == 0
    assert not traces(world.node)


def test_cleanup_ends_an_orphan(fresh_proxy: Proxy, world: ServiceLab) -> None:
    serve_web(fresh_proxy)
    fresh_proxy.start("--workers", "2")
    workers = fresh_proxy.workers()
    fresh_proxy.stop(signal.SIGKILL)
    assert answers(world.client, WEB, 80)

    done = world.node.run(*fresh_proxy.command("cleanup"))

    assert "nothing of userspace-proxy is left" in done.stdout
    assert all(map(has_ended, workers))
    assert not traces(world.node)


def test_an_orphan_ends_when_its_time_is_over(fresh_proxy: Proxy, world: ServiceLab) -> None:
    serve_web(fresh_proxy)
    fresh_proxy.start("--orphan-timeout", "1s")
    (worker,) = fresh_proxy.workers()
    fresh_proxy.stop(signal.SIGKILL)
    assert answers(world.client, WEB, 80)

    wait_until(lambda: has_ended(worker), "it has ended", 5)


def test_an_orphan_that_has_handed_over_ends_at_sigterm_though_a_connection_is_open(fresh_proxy: Proxy) -> None:
    with open_connection(fresh_proxy, "--drain-timeout", "0.2s", "--workers", "1"):
        (worker,) = fresh_proxy.workers()
        fresh_proxy.stop(signal.SIGKILL)
        fresh_proxy.start()
        assert not has_ended(worker)

        os.kill(worker, signal.SIGTERM)

        wait_until(lambda: has_ended(worker), "it has ended", 5)


def test_without_an_orphan_timeout_workers_end_with_their_control_process(fresh_proxy: Proxy) -> None:
    serve_web(fresh_proxy)
    fresh_proxy.start("--orphan-timeout", "0")
    (worker,) = fresh_proxy.workers()

    fresh_proxy.stop(signal.SIGKILL)

    wait_until(lambda: has_ended(worker), "the worker has ended", 5)


def test_a_successor_that_cannot_start_leaves_all_serving(fresh_proxy: Proxy, world: ServiceLab) -> None:
    serve_web(fresh_proxy)
    fresh_proxy.start()
    fresh_proxy.stop(signal.SIGKILL)

    with take_port(world.node, 10256), no_request_fails(world):
        fresh_proxy.start(wait=False)
        assert fresh_proxy.process is not None
        assert fresh_proxy.process.wait(20) == 1

    fresh_proxy.wait_logged("another program has it")
    fresh_proxy.start()
    assert answers(world.client, WEB, 80)


# ---- stops and deaths in the midst of it


async def collected(world: ServiceLab) -> Conversation:
    """Return a conversation with the serving process that has sent everything; `Taken` has not been sent."""
    with world.node.inside():
        turn, caller = join_and_call()
    conversation = Conversation(await caller.admitted.get())
    caller.close()
    turn.close()
    expect(await conversation.receive(), Present)
    conversation.send(TakeOver(VERSION, os.getpid()))
    while True:
        message, descriptors = await conversation.receive()
        for descriptor in descriptors:
            os.close(descriptor)
        if isinstance(message, Lock):
            return conversation


def join_and_call() -> tuple[socket.socket, Caller]:
    turn = join(Role.TAKES_TURN)
    caller = Caller(turn)
    caller.call()
    return turn, caller


def test_a_stop_during_a_hand_over_leaves_the_rules_to_the_successor(fresh_proxy: Proxy, world: ServiceLab) -> None:
    serve_web(fresh_proxy)
    fresh_proxy.start()

    async def take_over() -> None:
        conversation = await collected(world)
        assert fresh_proxy.process is not None
        fresh_proxy.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(wait_until, lambda: "stopping" in fresh_proxy.log(), "it has heard the signal")
        conversation.send(Taken())
        expect(await conversation.receive(), Released)
        conversation.close()

    asyncio.run(take_over())

    assert fresh_proxy.process is not None
    assert fresh_proxy.process.wait(20) == 0, "it has been told to stop"
    assert WEB in fresh_proxy.rules_text()


def test_a_stop_works_although_the_successor_is_silent(fresh_proxy: Proxy, world: ServiceLab) -> None:
    serve_web(fresh_proxy)
    fresh_proxy.start()

    async def hang() -> None:
        conversation = await collected(world)
        assert await asyncio.to_thread(fresh_proxy.stop) == 0
        conversation.close()

    asyncio.run(hang())

    assert not traces(world.node)


def test_a_successor_that_is_killed_before_the_one_before_has_made_way_leaves_a_worker_that_serves(
    fresh_proxy: Proxy, world: ServiceLab
) -> None:
    serve_web(fresh_proxy)

    name = ServicePortName(NamespacedName("default", "web"), "http", L4Protocol.TCP)
    spec = ListenerSpec(ServicePort(name, 80, (WEB,)), 10_400)

    async def make_no_way() -> None:
        with world.node.inside():
            listener = open_listener(L4Protocol.TCP, spec.proxy_port, 0)
            member = join(Role.SERVES)
        with listener, member, socket.socket(socket.AF_UNIX) as name:
            fresh_proxy.start(wait=False)
            while not (calls := list(heard(member))):
                await asyncio.sleep(0.01)
            with world.node.inside():
                conversation = Conversation(await answer(calls[0]))
            conversation.send(Present(VERSION, os.getpid(), [os.path.realpath(fresh_proxy.manifests)]))
            expect(await conversation.receive(), TakeOver)
            conversation.send(Inherit(0, Open([spec], 1)), [listener.fileno()])
            conversation.send(Lock(), [name.fileno()])
            expect(await conversation.receive(), Taken)
            fresh_proxy.stop(signal.SIGKILL)
            conversation.close()

    asyncio.run(make_no_way())

    wait_until(lambda: "the control process is gone" in fresh_proxy.log(), "its worker has noticed")
    fresh_proxy.wait_logged("serving on")


@pytest.mark.parametrize("after_s", [0.0, 0.01, 0.1, 0.3])
def test_a_stop_is_heeded_while_it_starts_anew(fresh_proxy: Proxy, world: ServiceLab, after_s: float) -> None:
    """The new program needs some tenths of a second before it can hear a signal."""
    serve_web(fresh_proxy)
    fresh_proxy.start()
    assert fresh_proxy.process is not None
    fresh_proxy.process.send_signal(signal.SIGUSR2)
    wait_until(lambda: "restarting in place" in fresh_proxy.log(), "the restart has begun")
    time.sleep(after_s)

    assert fresh_proxy.stop() == 0
    assert not traces(world.node)
    wait_until(lambda: not answers(world.client, WEB, 80), "nobody serves")


def test_a_second_restart_in_place_works_too(fresh_proxy: Proxy) -> None:
    serve_web(fresh_proxy)
    fresh_proxy.start()
    assert fresh_proxy.process is not None
    for _ in range(2):
        fresh_proxy.process.send_signal(signal.SIGUSR2)
        wait_until(lambda: "restarting in place" in fresh_proxy.log(), "the restart has begun")
        time.sleep(0.1)

    wait_until(lambda: fresh_proxy.log().count("ready:") == 2, "it is ready again")
    assert fresh_proxy.process.poll() is None


# ---- who may


def test_where_it_may_not_take_over_a_second_run_is_refused(fresh_proxy: Proxy, world: ServiceLab) -> None:
    serve_web(fresh_proxy)
    fresh_proxy.start()

    line = told(world.node, fresh_proxy, *fresh_proxy.run_arguments(), "--take-over", "never")

    assert "another userspace-proxy runs in this network namespace (process " in line
    assert answers(world.client, WEB, 80)


def test_take_over_always_takes_over_from_an_instance_with_other_manifests(
    fresh_proxy: Proxy, second: Proxy, world: ServiceLab, tmp_path: Path
) -> None:
    serve_web(fresh_proxy)
    fresh_proxy.start()
    second.manifests = tmp_path / "others"
    second.manifests.mkdir()
    second.apply("other", documents(service("other", "10.96.4.2"), endpoints("other", POD1)))

    second.start("--take-over", "always")

    assert answers(world.client, "10.96.4.2", 80)
    assert not answers(world.client, WEB, 80), "what it does not know is served no more"
    assert fresh_proxy.process is not None
    assert fresh_proxy.process.wait(20) == 0


def test_a_hanging_instance_is_named_and_serves_on(fresh_proxy: Proxy, world: ServiceLab) -> None:
    serve_web(fresh_proxy)
    fresh_proxy.start()
    assert fresh_proxy.process is not None
    fresh_proxy.process.send_signal(signal.SIGSTOP)
    try:
        line = told(world.node, fresh_proxy, *fresh_proxy.run_arguments())
    finally:
        fresh_proxy.process.send_signal(signal.SIGCONT)

    assert f"(process {fresh_proxy.process.pid})" in line
    assert "does not answer" in line
    assert answers(world.client, WEB, 80)


# ---- strangers: any local user, and root without capabilities

# Holds the names that were ever ours, and says more than enough to each socket that looks like ours.
STRANGER = """
import contextlib, os, socket, time
held = []
for name in ["userspace-proxy", "userspace-proxy-successor", *(f"userspace-proxy-{n}" for n in range(100))]:
    with contextlib.suppress(OSError):
        sock = socket.socket(socket.AF_UNIX)
        sock.bind("\\0" + name)
        sock.listen()
        held.append(sock)
numbers = []
for role in (0x75, 0x76, 0x77):
    for n in range(100):
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        sock.bind((role << 24 | n, 0))
        numbers.append(sock)
print("ready", flush=True)
give_up_at = time.monotonic() + 60
while time.monotonic() < give_up_at:
    for line in open("/proc/net/unix"):
        name = line.split()[-1]
        if name.startswith("@userspace-proxy-") and len(name) > 40:
            for _ in range(50):
                with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
                    sock.setblocking(False)
                    sock.connect("\\0" + name[1:])
                    socket.send_fds(sock, [b"0123456789abcdef" * 3], [0])
    time.sleep(0.005)
"""


@pytest.fixture
def stranger(world: ServiceLab, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Root without capabilities in the node's network namespace, which was there first."""
    log = tmp_path / "stranger"
    command = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-c", STRANGER)
    process = world.node.start(*command, log=log)
    wait_until(lambda: "ready" in log.read_text(), "the stranger has the names")
    yield process
    process.kill()
    process.wait(20)


def test_strangers_that_have_every_name_hinder_neither_run_nor_reload_nor_cleanup(
    stranger: subprocess.Popen[bytes], fresh_proxy: Proxy, second: Proxy, world: ServiceLab
) -> None:
    serve_web(fresh_proxy)
    fresh_proxy.start()
    assert fresh_proxy.process is not None
    with no_request_fails(world):
        fresh_proxy.process.send_signal(signal.SIGUSR2)
        wait_until(lambda: fresh_proxy.log().count("ready:") == 2, "it is ready again")
        second.start()
        assert fresh_proxy.process.wait(20) == 0
    line = told(world.node, second, "cleanup")
    assert second.process is not None
    assert f"(process {second.process.pid}) is running" in line
    workers = second.workers()
    second.stop(signal.SIGKILL)
    done = world.node.run(*second.command("cleanup"))

    warning = f"process {stranger.pid} of user 0 holds the socket @userspace-proxy without a proof"
    assert fresh_proxy.log().count(warning) == 2, "once in each of its lives"
    assert "nothing of userspace-proxy is left" in done.stdout
    wait_until(lambda: all(map(has_ended, workers)), "its workers have ended")
    assert stranger.poll() is None


def test_two_that_start_at_once_among_strangers_never_both_serve(
    stranger: subprocess.Popen[bytes], fresh_proxy: Proxy, second: Proxy
) -> None:
    serve_web(fresh_proxy)
    for proxy in (fresh_proxy, second):
        proxy.start("--take-over", "never", wait=False)

    wait_until(lambda: "ready:" in fresh_proxy.log() + second.log(), "one of them serves")
    ended = [proxy for proxy in (fresh_proxy, second) if proxy.process and proxy.process.poll() is not None]
    wait_until(
        lambda: [proxy for proxy in (fresh_proxy, second) if proxy.process and proxy.process.poll() == 1],
        "the other one is refused",
    )
    assert (fresh_proxy.log() + second.log()).count("ready:") == 1
    assert len(ended) <= 1
    assert stranger.poll() is None


def test_a_flood_of_connects_to_the_abstract_name_does_not_block_a_hand_over(
    fresh_proxy: Proxy, world: ServiceLab
) -> None:
    serve_web(fresh_proxy)
    fresh_proxy.start()
    with world.node.inside():
        held = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) for _ in range(100)]
    connected = [sock.connect_ex(NAME) for sock in held].count(0)

    assert connected <= 2, "nobody is accepted, so a queue is full at once"
    assert "is running" in told(world.node, fresh_proxy, "cleanup")
    for sock in held:
        sock.close()


def test_a_worker_that_hangs_is_replaced_before_the_control_process_starts_anew(
    fresh_proxy: Proxy, world: ServiceLab
) -> None:
    """A new control process could not take over from it, and no process would serve."""
    serve_web(fresh_proxy)
    fresh_proxy.start()
    assert fresh_proxy.process is not None
    os.kill(fresh_proxy.workers()[0], signal.SIGSTOP)

    fresh_proxy.process.send_signal(signal.SIGUSR2)

    said = re.compile("SIGUSR2 is not heeded, this process serves on: worker process|taken over from another process")
    wait_until(lambda: said.search(fresh_proxy.log()), "the worker is replaced")
    wait_until(lambda: answers(world.client, WEB, 80), "it is served again")
    assert fresh_proxy.stop() == 0


def test_a_reload_that_cannot_take_over_leaves_the_running_process_as_it_is(
    fresh_proxy: Proxy, world: ServiceLab
) -> None:
    serve_web(fresh_proxy)
    fresh_proxy.start("--take-over", "never")
    assert fresh_proxy.process is not None
    workers = fresh_proxy.workers()

    fresh_proxy.process.send_signal(signal.SIGUSR2)
    wait_until(lambda: "SIGUSR2 is not heeded, this process serves on: " in fresh_proxy.log(), "it was tried")

    assert fresh_proxy.process.poll() is None
    assert workers[0] in fresh_proxy.workers()
    fresh_proxy.serve("web", WEB, POD2)
    wait_until(lambda: ask(world.client, WEB) == "pod2", "changes are followed still")
    assert fresh_proxy.stop() == 0
