"""Cluster DNS as the control process sees it: a state sink, and the process that answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Sequence

import msgspec

from userspace_proxy.dataplane.channel import Channel, close_descriptors
from userspace_proxy.dataplane.process import exit_code
from userspace_proxy.dataplane.watchdog import LOOK_EVERY_S, Watchdog, activity_of
from userspace_proxy.dns import wire
from userspace_proxy.errors import StartError
from userspace_proxy.model.dns_names import ServiceNames
from userspace_proxy.model.names import NamespacedName
from userspace_proxy.model.state import ProxyState

# One frame: no answer waits for longer than this takes to be taken in.
_SERVICES_A_FRAME = 100
_HOSTS_A_FRAME = 1_000
_RESPAWN_PAUSE_S = 0.5
_EXIT_TIMEOUT_S = 2.0
_MODULE = "userspace_proxy.dns.server"

_encoder = msgspec.msgpack.Encoder()
_counts = msgspec.msgpack.Decoder(wire.Counts)
_Changes = Iterable[tuple[NamespacedName, ServiceNames | None]]
log = logging.getLogger(__name__)


class ClusterDns:
    """A state sink: the DNS process answers by the names of the latest state.

    The process is replaced if it dies or hangs; ``restarts`` counts that. *predecessors*: channels to DNS processes
    that serve at the same sockets; they end once this one can answer for every Service. *pods*: ranges of this node's
    pods, whose clients may ask for all names. ``held``: the addresses, once it is certain that no Service has them.
    """

    def __init__(
        self,
        settings: wire.DnsSettings,
        sockets: Sequence[socket.socket],
        predecessors: Sequence[socket.socket] = (),
        pods: Iterable[str] = (),
    ) -> None:
        self._settings = settings
        self._sockets = sockets
        self._predecessors = list(predecessors)
        self._pods = tuple(pods)
        self._state = ProxyState()
        self._clients = wire.Clients([])
        self._is_synced = False
        self._conflict = ""
        self.held: set[str] = set()
        self._ours: socket.socket | None = None
        self._channel: Channel | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting: deque[asyncio.Future[wire.Counts]] = deque()
        self._closing = False
        self.restarts = 0

    def start(self) -> None:
        """Start the process, and tell it all there is; raises OSError."""
        self._ours, theirs = socket.socketpair()
        with theirs:
            settings = msgspec.json.encode(self._settings).decode()
            command = [sys.executable, "-P", "-m", _MODULE, str(theirs.fileno()), settings]
            try:
                # Its own session: signals from a terminal are for the control process.
                self._process = subprocess.Popen(
                    command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
                )
            except BaseException:
                self._ours.close()
                raise
        self._channel = Channel(self._ours, self._on_frame, self._on_close)
        self._send(self._clients)
        self._tell(self._state.names.items())
        if self._is_synced:
            self._send(wire.Synced())
        # With a predecessor, queries are for that until this process has all names.
        if self._is_synced or not self._predecessors:
            self._give_sockets()

    def _give_sockets(self) -> None:
        self._send(wire.Sockets(), [sock.fileno() for sock in self._sockets])

    async def sync(self, state: ProxyState) -> None:
        """Tell the process what has changed since the last sync."""
        told, self._state = self._state.names, state
        clients = wire.Clients([*self._pods, *state.node.pod_cidrs, *state.node.addresses, *self._settings.addresses])
        if clients != self._clients:
            self._clients = clients
            self._send(clients)
        self._tell((name, names) for name, names in state.names.items() if told.get(name) is not names)
        self._tell((name, None) for name in told.keys() - state.names.keys())
        if not self._is_synced:
            self._conflict = _conflict(state, self._settings.addresses)
            self.held.update(() if self._conflict else self._settings.addresses)
            self._is_synced = True
            self._send(wire.Synced())
            if self._predecessors:
                self._give_sockets()
                await self.counts()  # it has read all of this, and answers
                end_processes(self._predecessors)
                self._predecessors.clear()

    def _tell(self, changes: _Changes) -> None:
        part: list[tuple[NamespacedName, ServiceNames | None]] = []
        hosts = 0
        for name, names in changes:
            part.append((name, names))
            hosts += sum(len(group.hosts) for group in names.groups) if names else 0
            if len(part) >= _SERVICES_A_FRAME or hosts >= _HOSTS_A_FRAME:
                self._send(wire.Names(part))
                part, hosts = [], 0
        if part:
            self._send(wire.Names(part))

    def _send(self, request: wire.Request, descriptors: Sequence[int] = ()) -> None:
        if self._channel is not None:
            self._channel.send(_encoder.encode(request), descriptors)

    # ---- the process

    def _on_frame(self, body: bytes, descriptors: list[int]) -> None:
        close_descriptors(descriptors)
        if self._waiting and not (waiting := self._waiting.popleft()).done():
            waiting.set_result(_counts.decode(body))

    def _on_close(self) -> None:
        self._channel = None
        for waiting in self._waiting:
            waiting.cancel()
        self._waiting.clear()
        if not self._closing and self._process is not None:
            task = asyncio.create_task(self._replace(self._process), name="replace the DNS process")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _replace(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        code = await exit_code(process, _EXIT_TIMEOUT_S)
        self.restarts += 1
        log.error("DNS process %d has ended (exit code %s); another one takes its sockets", process.pid, code)
        if self.restarts > 1:
            await asyncio.sleep(_RESPAWN_PAUSE_S)
        while True:
            with contextlib.suppress(OSError):
                self.start()
                return
            await asyncio.sleep(_RESPAWN_PAUSE_S)

    async def run(self) -> None:
        """Replace the process if it hangs. Runs until cancelled.

        Raises:
            StartError: a Service of the first state has an address of this server.
        """
        watched, watchdog = self._process, Watchdog()
        owed: asyncio.Future[wire.Counts] | None = None
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            if self._conflict:
                raise StartError(self._conflict)
            if watched is not self._process:
                watched, watchdog, owed = self._process, Watchdog(), None
            if self._channel is None or watched is None:
                continue
            if owed is None or owed.done():
                if owed is not None:
                    watchdog.note_answer()
                owed = self._ask()
            elif why := watchdog.note_silence(activity_of(watched.pid)):
                self._channel.break_off(why)

    def _ask(self) -> asyncio.Future[wire.Counts]:
        """Ask for the counters. The future is cancelled if the process ends."""
        future: asyncio.Future[wire.Counts] = asyncio.get_running_loop().create_future()
        if self._channel is None:
            future.cancel()
        else:
            self._waiting.append(future)
            self._send(wire.Ask())
        return future

    async def counts(self) -> wire.Counts:
        """Return the counters of the process; none if it does not answer."""
        future = self._ask()
        await asyncio.wait({future}, timeout=_EXIT_TIMEOUT_S)
        return future.result() if future.done() and not future.cancelled() else wire.Counts()

    # ---- the end

    def inheritance(self) -> list[socket.socket]:
        """Return what a successor needs: the sockets, and the channel to the process, which serves on meanwhile."""
        return [*self._sockets, *([self._ours] if self._ours is not None and self._channel is not None else ())]

    def leave(self) -> None:
        """Let the process serve on: a successor has the channel to it, and ends it."""
        self._closing = True
        if self._channel is not None:
            self._channel.close()

    async def close(self) -> None:
        """End the process, unless a successor does."""
        self._send(wire.Close())
        is_left, self._closing = self._closing, True
        for task in self._tasks:
            task.cancel()
        end_processes(self._predecessors)
        if self._process is not None and not is_left and await exit_code(self._process, _EXIT_TIMEOUT_S) is None:
            self._process.kill()
        if self._channel is not None:
            self._channel.close()
        for sock in self._sockets:
            sock.close()


def _conflict(state: ProxyState, addresses: Iterable[str]) -> str:
    for name, service_port in state.service_ports.items():
        if taken := set(addresses) & {*service_port.cluster_ips, *service_port.external_ips}:
            return f"--dns {taken.pop()}: Service {name.service} has this address; choose another one"
    return ""


def end_processes(channels: Iterable[socket.socket]) -> None:
    """Tell the DNS processes at the other ends of *channels* to end, and close these."""
    for sock in channels:
        channel = Channel(sock, lambda _body, _descriptors: None, lambda: None)
        channel.send(_encoder.encode(wire.Close()))
        channel.close()
