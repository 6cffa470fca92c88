"""Ten disasters, and failures of one pod: what clients see in each mode and in other proxies, side by side.

`disasters.toml` states each one, and the annotations and expected failures of disasters. An event hits all modes at the
same time.
"""

from __future__ import annotations

import asyncio
import contextlib
import email
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from threading import Thread

import msgspec

from userspace_proxy.compare.arrivals import BUCKET_S, Tally, send_requests, wait_until_all_answer
from userspace_proxy.compare.modes import HAPROXY, NGINX, USERSPACE_COPY, ComparedMode, manifests_of
from userspace_proxy.compare.nodes import PEERS, CompareLab, ModeNode, fill_in, load_stream_module
from userspace_proxy.compare.results import DIRECT_AGAIN, ModeRun, Timeline
from userspace_proxy.compare.session import MODE_ERRORS, Session, reason_of
from userspace_proxy.lab import wait_until

DISASTER_PODS = 8
SLOW_S = 1.0
PATIENCE_S = 5.0  # longer than HAProxy needs for three retries, one second apart
_PORT = 8092
_EVENT_S = 0.5
_SERVICE = 2
_HELD_GAP_S = 0.1
_DOWNLOAD_BYTES = 500_000
_FLAPS = 3
_PAUSE_S = 1.0
_END_S = 5.0
_CONTROL = "disaster-control"
_READY = " ready: "  # in the log of each process of this proxy that has begun to serve


@dataclass(frozen=True, slots=True)
class Disaster:
    """One disaster, or one failure of a pod, as `disasters.toml` states it. Nothing is expected of a failure.

    ``held``: the open connections to each mode. ``haproxy_check``: how HAProxy checks each endpoint.
    """

    name: str
    title: str
    what: str
    endpoints: int
    length_s: float
    why: str = ""
    expected: dict[str, int] = field(default_factory=dict)
    apart: dict[str, int] = field(default_factory=dict)
    victims: tuple[int, ...] = ()
    told_after_s: float | None = None
    annotations: dict[str, str] = field(default_factory=dict)
    held: int = 6
    held_path: str = "/"
    open: str = ""
    slow_s: float = SLOW_S
    patience_s: float = PATIENCE_S
    haproxy_check: str = "inter 1s"

    @property
    def case(self) -> str:
        """The name of its figures in results."""
        return f"disaster-{self.name}" if self.expected else self.name

    @property
    def others(self) -> list[int]:
        return [index for index in range(self.endpoints) if index not in self.victims]

    def at_most(self, mode: ModeRun) -> tuple[int, int]:
        """Return how many new connections may fail in *mode*, and how many requests may be lost with their endpoint."""
        kind = "kernel" if mode.kind == "kernel" else mode.name
        return self.expected[kind], self.apart[kind]

    def surprises(self, mode: ModeRun, figures: Mapping[str, float]) -> list[str]:
        """Return the *figures* of *mode* that are worse than `disasters.toml` allows."""
        failed, received = self.at_most(mode)
        explained = figures["lost_at_victims" if self.victims else "lost"] if self.open else 0
        checks = (
            (figures["failed"] > failed, "more failures"),
            (figures["received"] > received, "more requests lost on the way"),
            (figures["lost"] > explained, "open connections lost without a reason"),
        )
        return [what for is_worse, what in checks if is_worse]


_FILE = Path(__file__).with_suffix(".toml")
_STATED = msgspec.toml.decode(_FILE.read_bytes(), type=dict[str, tuple[Disaster, ...]])
DISASTERS, POD_FAILURES = _STATED["disasters"], _STATED["failures"]


def takes_part(mode: ComparedMode, disaster: Disaster) -> bool:
    """Return whether *mode* is included in *disaster*. All modes see a failure."""
    if not disaster.expected:
        return mode.name != DIRECT_AGAIN
    return (mode.ours and mode.name != USERSPACE_COPY) or mode.name == HAPROXY


class Scene:
    """The servers of one disaster, and the modes in front of them. A context manager that ends and restores all."""

    def __init__(self, lab: CompareLab, disaster: Disaster, nodes: Mapping[ComparedMode, ModeNode]) -> None:
        self.lab = lab
        self.disaster = disaster
        self.nodes = nodes
        self.untold: dict[ComparedMode, str] = {}
        self.servers: dict[int, subprocess.Popen[bytes]] = {}
        self._haproxies: list[subprocess.Popen[bytes]] = []
        self._nginxes: list[subprocess.Popen[bytes]] = []
        self._resetting: list[socket.socket] = []

    def __enter__(self) -> Scene:
        (self.lab.folder / "download").write_bytes(bytes(_DOWNLOAD_BYTES))
        for index in range(self.disaster.endpoints):
            self.serve(index)
        for index in self.disaster.victims:
            self.lab.pods[index].run("nft", "-f", str(PEERS / "received.rules"))
        for mode, node in self.nodes.items():
            node.forget_connections()  # a client's port may come again, with the endpoint of an earlier disaster
            everyone = range(self.disaster.endpoints)
            if mode.name == HAPROXY:
                self.start_haproxy(node)
            elif mode.name == NGINX:
                self._nginxes.append(node.host.start(*self._nginx(node, everyone), log=node.folder / "log"))
            else:
                self._tell(mode, node, everyone)
        return self

    def __exit__(self, *_: object) -> None:
        for listener in self._resetting:
            listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            listener.close()
        for nginx in self._nginxes:
            nginx.terminate()  # it ends its workers
        for process in (*self.servers.values(), *self._haproxies):
            process.kill()
        for process in (*self.servers.values(), *self._haproxies, *self._nginxes):
            process.wait(_END_S)
        for index in self.disaster.victims:
            for table in ("silence", "received"):
                self.lab.pods[index].run("nft", "delete", "table", "inet", table, check=False)

    def received(self, mode: ComparedMode) -> int:
        """Return how many requests of new clients the victims received from *mode* and never answered."""
        count = 0
        for index in self.disaster.victims:
            listed = self.lab.pods[index].run("nft", "-j", "list", "set", "inet", "received", "unanswered").stdout
            elements = msgspec.json.decode(listed)["nftables"][-1]["set"].get("elem", [])
            count += sum(each["concat"][0].startswith(f"10.{self.nodes[mode].net}.") for each in elements)
        return count

    def addresses_of(self, mode: ComparedMode) -> list[tuple[str, int]]:
        """Return the addresses that clients of *mode* dial in turn."""
        node = self.nodes[mode]
        if mode.kind == "none":
            return [(ip, _PORT) for ip in node.pod_ips[: self.disaster.endpoints]]
        return [(node.service_ip(_SERVICE) if mode.ours else node.node_ip, _PORT)]

    def serve(self, index: int) -> None:
        """Start the server of an endpoint."""
        pod, folder = self.lab.pods[index], self.lab.folder
        target = folder / f"disaster-{pod.name}.conf"
        config = fill_in(PEERS / "disaster-pod.conf", target, folder=folder, name=pod.name, port=_PORT)
        command = ("nginx", "-p", str(folder), "-c", str(config))
        self.servers[index] = pod.start(*command, log=folder / "backends.log")

    def end(self, index: int, number: signal.Signals) -> None:
        """End the server of an endpoint by signal *number*."""
        self.servers[index].send_signal(number)
        self.servers[index].wait(_END_S)

    def reset_connections(self, index: int) -> None:
        """Accept connections in the place of an endpoint's server, and reset each."""
        with self.lab.pods[index].inside():
            listener = socket.create_server(("", _PORT), backlog=4096)
        self._resetting.append(listener)
        Thread(target=_reset_each, args=(listener,), daemon=True).start()

    def start_haproxy(self, node: ModeNode) -> None:
        """Start HAProxy; a running one hands over its sockets and ends with its connections."""
        servers = (f"  server pod{index} {node.pod_ips[index]}:{_PORT}" for index in range(self.disaster.endpoints))
        folder = node.folder
        listed, check = "\n".join(servers), self.disaster.haproxy_check
        config = node.fill_in(PEERS / "disaster.cfg", folder=folder, port=_PORT, servers=listed, check=check)
        control = str(folder / _CONTROL)
        takes_over = ("-x", control, "-sf", str(self._haproxies[-1].pid)) if self._haproxies else ()
        command = ("haproxy", "-db", "-q", "-f", str(config), *takes_over)
        self._haproxies.append(node.host.start(*command, log=folder / "log"))

    def _nginx(self, node: ModeNode, alive: Iterable[int]) -> list[str]:
        """Write the configuration of nginx with the numbered endpoints, and return its command."""
        servers = " ".join(f"server {node.pod_ips[index]}:{_PORT};" for index in alive)
        module, folder = load_stream_module(), node.folder
        template = PEERS / "disaster-nginx.conf"
        config = node.fill_in(template, folder=folder, port=_PORT, servers=servers, load_stream_module=module)
        return ["nginx", "-p", str(folder), "-c", str(config)]

    def tell(self, alive: Iterable[int]) -> None:
        """Make all modes use only the numbered endpoints. A mode that cannot be told is noted in ``untold``."""
        numbers = list(alive)
        for mode, node in self.nodes.items():
            try:
                self._tell(mode, node, numbers)
            except MODE_ERRORS as error:
                self.untold[mode] = reason_of(error)

    def _tell(self, mode: ComparedMode, node: ModeNode, alive: Iterable[int]) -> None:
        if mode.kind == "none":
            return  # clients dial the pods themselves
        if mode.name == HAPROXY:
            _set_haproxy_servers(node.folder / _CONTROL, self.disaster.endpoints, alive)
            return
        if mode.name == NGINX:
            node.host.run(*self._nginx(node, alive), "-s", "reload")
            return
        endpoints = [{"addresses": [node.pod_ips[index]]} for index in alive]
        node.fill_in(
            PEERS / "disaster.yaml",
            manifests_of(node) / "disaster.yaml",
            name=self.disaster.name,
            ip=node.service_ip(_SERVICE),
            port=_PORT,
            annotations=msgspec.json.encode(self.disaster.annotations).decode(),
            endpoints=msgspec.json.encode(endpoints).decode(),
        )


def _set_haproxy_servers(socket_path: Path, count: int, alive: Iterable[int]) -> None:
    """Set the state of *count* servers through HAProxy's control socket, as ingress controllers do."""
    ready = set(alive)
    for index in range(count):
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(2.0)
            control.connect(str(socket_path))
            state = "ready" if index in ready else "maint"
            control.sendall(f"set server disaster/pod{index} state {state}\n".encode())
            control.recv(1024)


def _reset_each(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the listener has been shut down
        while True:
            accepted, _ = listener.accept()
            accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            accepted.close()


# ---- events


def _kill(scene: Scene) -> None:
    for index in scene.disaster.victims:
        scene.end(index, signal.SIGKILL)


def _stop(scene: Scene) -> None:
    for index in scene.disaster.victims:
        scene.servers[index].send_signal(signal.SIGSTOP)


def _leave(scene: Scene) -> None:
    for index in scene.disaster.victims:
        scene.servers[index].send_signal(signal.SIGQUIT)  # nginx: accept no new connections and finish the answers


def _load_in_pods(rules: str) -> Callable[[Scene], None]:
    def load(scene: Scene) -> None:
        for index in scene.disaster.victims:
            scene.lab.pods[index].run("nft", "-f", str(PEERS / rules))

    return load


def _reset(scene: Scene) -> None:
    _kill(scene)
    for index in scene.disaster.victims:
        scene.reset_connections(index)


def _flap(scene: Scene) -> None:
    for _ in range(_FLAPS):
        _kill(scene)
        time.sleep(_PAUSE_S)
        for index in scene.disaster.victims:
            scene.serve(index)
        time.sleep(_PAUSE_S)


def _roll(scene: Scene) -> None:
    everyone = range(scene.disaster.endpoints)
    for index in everyone:
        scene.tell(other for other in everyone if other != index)
        scene.end(index, signal.SIGQUIT)  # nginx: accept no new connections and finish the answers
        time.sleep(_PAUSE_S)
        scene.serve(index)
        time.sleep(_PAUSE_S / 2)
        scene.tell(everyone)
        time.sleep(_PAUSE_S / 2)


def _flush(scene: Scene) -> None:
    for mode, node in scene.nodes.items():
        if mode.name == HAPROXY:
            continue
        if "legacy" in node.host.run("iptables", "--version", check=False).stdout:
            for table in ("nat", "mangle", "filter"):
                node.host.run("iptables", "-t", table, "-F", check=False)
        tables = node.host.run("nft", "list", "tables").stdout.splitlines()
        node.host.run("nft", "-f", "-", stdin="".join(f"delete {table}\n" for table in tables))
        node.track_connections()


def _upgrade(scene: Scene) -> None:
    logs = {node.folder / "log" for mode, node in scene.nodes.items() if mode.ours}
    starts = {log: log.read_text().count(_READY) for log in logs}
    for mode, node in scene.nodes.items():
        if mode.name == HAPROXY:
            scene.start_haproxy(node)
        else:
            node.processes[0].send_signal(signal.SIGUSR2)
    for log, count in starts.items():
        wait_until(lambda log=log, count=count: log.read_text().count(_READY) > count, "no new process", log=log)  # type: ignore[misc]


_EVENTS: dict[str, Callable[[Scene], None]] = {
    "dies": _kill,
    "silent": _load_in_pods("silence.rules"),
    "leaves": _leave,
    "killed": _kill,
    "stopped": _stop,
    "half-silent": _load_in_pods("silence.rules"),
    "unreachable": _load_in_pods("unreachable.rules"),
    "resets": _reset,
    "flapping": _flap,
    "rolling": _roll,
    "removed": lambda _: None,  # the victims' servers continue
    "flushed": _flush,
    "upgraded": _upgrade,
}


# ---- clients


@dataclass
class _Held:
    """The open connections to one mode, by the pod that they lead to."""

    opened: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


async def _hold(held: _Held, address: tuple[str, int], path: str, end_at: float) -> None:
    """Send requests over one connection until *end_at*; note the pod that answers, and whether an answer fails."""
    pod, writer = "", None
    try:
        reader, writer = await asyncio.open_connection(*address)
        while time.monotonic() < end_at:
            writer.write(f"GET {path} HTTP/1.1\r\nHost: disaster\r\n\r\n".encode())
            async with asyncio.timeout(PATIENCE_S):
                head = email.message_from_bytes((await reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")[2])
            if not pod:
                held.opened.append(pod := head["Server-Name"])
            async with asyncio.timeout(2 * PATIENCE_S):
                await reader.readexactly(int(head["Content-Length"]))
            await asyncio.sleep(_HELD_GAP_S)
    except (OSError, EOFError):
        held.lost.append(pod)
    finally:
        if writer is not None:
            writer.transport.abort()


async def _all_clients(
    scene: Scene, tallies: Mapping[ComparedMode, Tally], held: Mapping[ComparedMode, _Held], started_at: float
) -> None:
    length_s = _EVENT_S + scene.disaster.length_s
    async with asyncio.TaskGroup() as clients:
        for mode, of_mode in held.items():
            for _ in range(scene.disaster.held):
                clients.create_task(
                    _hold(of_mode, scene.addresses_of(mode)[0], scene.disaster.held_path, started_at + length_s)
                )
        await send_requests(list(tallies.values()), started_at, length_s)


def happen(session: Session, disaster: Disaster, number: int = 1) -> None:
    """Let *disaster* happen to all modes that take part, and add what their clients saw to the results of a round.

    A mode that cannot be told of it becomes a note and has no result.
    """
    nodes = {mode: node for mode, node in session.running.items() if takes_part(mode, disaster)}
    if not nodes:
        return
    with Scene(session.lab, disaster, nodes) as scene:
        able = []
        for mode, node in nodes.items():
            with session.noting(disaster.title):
                wait_until_all_answer(mode, node, scene.addresses_of(mode), disaster.endpoints)
                able.append(mode)
        length_s = _EVENT_S + disaster.length_s
        tallies = {
            mode: Tally(cycle(scene.addresses_of(mode)), length_s, disaster.slow_s, disaster.patience_s)
            for mode in able
        }
        held = {mode: _Held() for mode in able}

        def event() -> None:
            time.sleep(max(0.0, started_at + _EVENT_S - time.monotonic()))
            _EVENTS[disaster.name](scene)
            if disaster.told_after_s is not None:
                time.sleep(disaster.told_after_s)
                scene.tell(disaster.others)

        with ThreadPoolExecutor(1, "disaster") as beside:
            started_at = time.monotonic() + 0.05
            happened = beside.submit(event)
            with session.lab.client.inside():
                asyncio.run(_all_clients(scene, tallies, held, started_at))
        happened.result()
        # Without victims, it is the proxy that lost a client which it had connected.
        received = {mode: scene.received(mode) if disaster.victims else tally.cut for mode, tally in tallies.items()}
    for mode, reason in scene.untold.items():
        session.note(f"{disaster.title}: {mode.title} could not be told: {reason}")
    victims = {session.lab.pods[index].name for index in disaster.victims}
    told_s = _EVENT_S + (disaster.told_after_s or 0.0)
    for mode, tally in tallies.items():
        if mode in scene.untold:
            continue
        counts = tally.good, tally.slow, tally.failed
        line = Timeline(disaster.case, mode.name, number, BUCKET_S, _EVENT_S, told_s, *counts)
        session.results.timelines.append(line)
        if disaster.expected:
            figures = figures_of(line, received[mode], held[mode].opened, held[mode].lost, victims)
            session.add(disaster.case, mode, number, figures)


def figures_of(
    line: Timeline, received: int, opened: Sequence[str], lost: Sequence[str], victims: Container[str]
) -> dict[str, float]:
    """Return the figures of one disaster in one mode.

    *received*: the requests that a victim, or a proxy, received and did not answer. They are counted apart from
    ``failed``, because they must not be sent twice. ``recover_s``: from the event to the last new client that failed or
    waited.
    """
    bad = [index for index, counts in enumerate(zip(line.slow, line.failed, strict=True)) if any(counts)]
    return {
        "requests": sum((*line.good, *line.slow, *line.failed)),
        "failed": max(0, sum(line.failed) - received),
        "received": min(received, sum(line.failed)),
        "slow": sum(line.slow),
        "recover_s": max(0.0, (bad[-1] + 1) * line.bucket_s - line.event_s) if bad else 0.0,
        "opened": len(opened),
        "lost": len(lost),
        "lost_at_victims": sum(pod in victims for pod in lost),
    }
