"""The life of this process: signals, take-over from a predecessor, hand-over to a successor, restart, end.

Some process accepts connections at every moment: this one stops when its successor reports that it serves. If this
process crashes, its workers continue to serve.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import NoReturn

from userspace_proxy.config.settings import Settings
from userspace_proxy.dataplane.handover import (
    Conversation,
    HandoverPlane,
    Incumbent,
    Refused,
    Released,
    TakeOver,
    hand_over,
)
from userspace_proxy.dataplane.memory import Memories
from userspace_proxy.dataplane.process import answers_to
from userspace_proxy.errors import StartError, SyncError
from userspace_proxy.logs import flush_log
from userspace_proxy.model.listeners import ListenerSpec
from userspace_proxy.runtime.instance_lock import InstanceLock
from userspace_proxy.runtime.running import RunningProxy

_REAP_EVERY_S = 1.0
# How long a process that gets a stop signal during a hand-over waits for the successor to serve.
_DECIDE_S = 2.0
# Environment of the new program: the descriptors of listeners that outlive a restart in place.
_KEPT_LISTENERS = "USERSPACE_PROXY_LISTENERS"
# Set for a process that only tests whether a restart in place would succeed. Other versions use the same name.
_DRY_RUN = "USERSPACE_PROXY_REHEARSAL"
_DRY_RUN_S = 30.0
# Longer than it takes to replace a worker that hangs.
_WORKERS_ANSWER_S = 10.0
_DRAINING = "; open connections go on here"
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

log = logging.getLogger(__name__)


class Ending(Enum):
    """How this process ends.

    STOP: rules are removed and connections drained. RULES_STAY: the kernel continues to serve. HANDED_OVER: a successor
    serves. RESTART: this process becomes a new program of the same command line.
    """

    STOP = "stop"
    RULES_STAY = "rules stay"
    HANDED_OVER = "handed over"
    RESTART = "restart"


class Lifecycle:
    """Takes over from the predecessor of this process, hands over to its successor, and ends this process.

    ``ending``: how this process ends, None until that is decided; ``stop`` is set at the same time. ``cut``: resets the
    draining connections, once there is a data plane.
    """

    def __init__(self, settings: Settings, *, kernel_serves: bool = False) -> None:
        """*kernel_serves*: the kernel forwards traffic by its rules, without listeners of this process."""
        self._settings = settings
        self._kernel_serves = kernel_serves
        self.stop = asyncio.Event()
        self.cut: Callable[[], None] | None = None
        self.ending: Ending | None = None
        self._yielded = asyncio.Event()
        self._released = asyncio.Event()
        self._decided = asyncio.Event()  # cleared during a hand-over: the successor may serve already, or never
        self._decided.set()
        self._drain_is_bounded = False
        self._told_to_stop = asyncio.Event()
        self._serves_on_alone = False  # traffic continues if this process ends now
        self._plane: HandoverPlane | None = None
        self._successors = 0
        self._since = 0.0  # the monotonic second from which the successor needs pins in `Released`
        self._learnt_last: Memories = []
        self._dry_run: asyncio.Task[None] | None = None
        self._is_replaced = False  # the new program is about to begin

    def install_signal_handlers(self) -> None:
        loop = asyncio.get_running_loop()
        for signum in _STOPS:
            if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
                continue  # nohup: the process outlives its terminal
            loop.add_signal_handler(signum, self._on_signal, signum)
        loop.add_signal_handler(signal.SIGUSR2, self._on_restart)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*_STOPS, signal.SIGUSR2))  # blocked during a restart in place

    # ---- the predecessor

    async def take_over(self, plane: HandoverPlane, lock: InstanceLock) -> list[ListenerSpec]:
        """Serve at the listeners of the predecessor, if there is one; return them.

        Raises:
            StartError: the listeners cannot be taken over; the predecessor continues to serve.
        """
        self._plane = plane
        if not lock.conversations:
            plane.keep_on(lock.name)
            return []
        if not lock.listeners:  # the kernel serves until our rules are there
            plane.keep_on(lock.name)
            await lock.taken()
            log.info("taken over from another process; the kernel serves meanwhile")
            return []
        try:
            specs = await plane.adopt(lock.listeners)
        except (OSError, SyncError) as error:
            plane.leave()
            lock.give_back()
            raise StartError(f"what serves now cannot be taken over, it goes on: {error}") from None
        # Before the predecessor stops accepting: if this process dies at any moment, some workers serve on.
        with contextlib.suppress(SyncError):  # a worker has died; its replacement gets the request, too
            await answers_to(plane.keep_on(lock.name))
        self._serves_on_alone = True
        await plane.begin(await lock.taken())
        log.info("taken over from another process: %d listeners", len(specs))
        return specs

    async def note_ready(self, ready: asyncio.Event, plane: HandoverPlane) -> None:
        """Once *ready*, let traffic continue if this process fails, where that is possible."""
        await ready.wait()
        self._serves_on_alone = self._kernel_serves or not plane.handover_obstacle

    # ---- the successor

    async def hand_over_to(
        self, proxy: RunningProxy, name: socket.socket, asked: TakeOver, conversation: Conversation
    ) -> None:
        """Hand everything over to the process that *asked*, and end; or refuse."""
        plane = proxy.plane
        if plane.handover_obstacle and not self._kernel_serves:
            conversation.send(Refused(f"{plane.handover_obstacle}; stop it first"))
            return
        if self.stop.is_set() or not self._serves_on_alone:
            conversation.send(Refused("it just begins or ends; try again"))
            return
        self._decided.clear()
        async with proxy.proxier.paused():
            try:
                self._since = time.monotonic()
                await plane.stats()  # brings the latest pins with it
                checks = proxy.health_checks.listeners() if asked.health_checks else ()
                of_dns = proxy.dns.inheritance() if asked.cluster_dns and proxy.dns is not None else ()
                await hand_over(conversation, plane.inheritance(), name, checks, of_dns)
                log.info("handed over to process %d%s", asked.pid, "" if self._kernel_serves else _DRAINING)
                is_told_to_stop = self.stop.is_set()
                self.ending = Ending.HANDED_OVER
                self._successors = asked.workers
                self.stop.set()
            finally:
                self._decided.set()
            if is_told_to_stop:
                self._on_signal(signal.SIGTERM)
            await self._yielded.wait()
        conversation.send(Released(self._learnt_last))
        await conversation.sent()
        self._released.set()

    def _on_signal(self, signum: signal.Signals) -> None:
        if self._is_replaced:
            _leave_to_new_program(signum)
            return
        self._told_to_stop.set()
        if not self.stop.is_set() or self.ending is Ending.RESTART:
            # A service manager's stop is often the first half of a restart. kube-proxy leaves its rules, too.
            if self._kernel_serves and signum is signal.SIGTERM:
                log.info("stopping: rules stay and the kernel serves on; `userspace-proxy cleanup` removes them")
                self.ending = Ending.RULES_STAY
            else:
                log.info("stopping: rules away, then up to %.3g s for open connections", self._settings.drain_timeout_s)
                self.ending = Ending.STOP
            self.stop.set()
        elif self.cut is not None and self.ending is Ending.HANDED_OVER and not self._drain_is_bounded:
            log.info("up to %.3g s more for open connections", self._settings.drain_timeout_s)
            asyncio.get_running_loop().call_later(self._settings.drain_timeout_s, self.cut)
            self._drain_is_bounded = True
        elif self.cut is not None:
            log.info("cutting the connections that are left")
            self.cut()

    def _on_restart(self) -> None:
        """Restart in place, for an upgrade: the new program of the same command line takes over from our workers."""
        if self.stop.is_set() or self._dry_run is not None:
            return
        if not self._serves_on_alone or "-" in self._settings.paths:
            log.error("SIGUSR2 is not heeded: not ready yet, --workers 0, or the manifests came from stdin")
            return
        self._dry_run = asyncio.create_task(self._restart(), name="restart")

    async def _restart(self) -> None:
        try:
            obstacle = await _run_dry() or await self._ask_workers()
        finally:
            self._dry_run = None
        if self.stop.is_set():
            return
        if not self._decided.is_set():
            obstacle = "another process takes over just now"
        if obstacle:
            log.error("SIGUSR2 is not heeded, this process serves on: %s", obstacle)
            return
        log.info("restarting in place; workers serve on meanwhile")
        self.ending = Ending.RESTART
        self.stop.set()

    async def _ask_workers(self) -> str:
        """Return why the new process would find no worker that hands over; "" if all answer."""
        if self._plane is None:
            return ""
        try:
            async with asyncio.timeout(_WORKERS_ANSWER_S):
                await self._plane.stats()
        except TimeoutError:
            return "a worker does not answer"
        return self._plane.failing

    # ---- the end

    async def wait_for_handover(self, incumbent: Incumbent) -> None:
        """Wait until a hand-over under way has succeeded or failed."""
        if self._dry_run is not None:
            self._dry_run.cancel()
            await asyncio.wait({self._dry_run})
        try:
            async with asyncio.timeout(_DECIDE_S):
                await self._decided.wait()
        except TimeoutError:
            incumbent.give_up()

    async def end(self, plane: HandoverPlane, remove_rules: Callable[[], Awaitable[None]]) -> None:
        """End as decided. Without a decision this is a crash, and traffic continues if that is possible.

        *remove_rules* drains connections and removes every rule.
        """
        if self.ending is Ending.HANDED_OVER:
            self._learnt_last = await plane.make_way(self._successors, self._since)
            self._yielded.set()
            await plane.close(self._settings.orphan_timeout_s, successors=self._successors)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DECIDE_S):
                    await self._released.wait()
            if self._settings.in_cluster:  # the kubelet would start us again, to take everything back
                await self._told_to_stop.wait()
        elif self.ending is not Ending.STOP and self._serves_on_alone and not plane.handover_obstacle:
            plane.leave()
        else:
            await remove_rules()
        if self.ending is Ending.RESTART:
            self._is_replaced = True
            # Blocked until the new program has its handlers: an earlier signal would kill it. The kernel gives a
            # signal to another thread of this process, which has not blocked it; then the handler passes it on.
            signal.pthread_sigmask(signal.SIG_BLOCK, (*_STOPS, signal.SIGUSR2))
            for signum in (*_STOPS, signal.SIGUSR2):
                if signal.getsignal(signum) != signal.SIG_IGN:
                    signal.signal(signum, _leave_to_new_program)


def _leave_to_new_program(signum: int, _: object = None) -> None:
    """Send the signal to the main thread, which has blocked it: it is pending there when the new program begins."""
    signal.pthread_kill(threading.main_thread().ident or 0, signum)


async def _run_dry() -> str:
    """Run the same command line up to the moment before it takes over; return why it fails, "" if it does not."""
    try:
        process = subprocess.Popen(  # noqa: ASYNC220 - as workers are started
            _same_command(),
            env={**os.environ, _DRY_RUN: "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        return f"{sys.executable}: {error.strerror}"
    reading = asyncio.get_running_loop().run_in_executor(None, process.communicate)
    try:
        async with asyncio.timeout(_DRY_RUN_S):
            _, stderr = await asyncio.shield(reading)
    except TimeoutError:
        return f"the new process is not ready after {_DRY_RUN_S:.0f} s"
    finally:
        process.kill()
        await asyncio.wait({reading})
    if not process.returncode:
        return ""
    lines = stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"the new process exited {process.returncode}"


def is_dry_run() -> bool:
    return _DRY_RUN in os.environ


def _same_command() -> list[str]:
    safe_path = [] if sys.flags.safe_path else ["-P"]  # what Python itself imports first is not from here either
    return [sys.executable, *safe_path, *sys.orig_argv[1:]]


def restart_with(listeners: Sequence[socket.socket]) -> NoReturn:
    """Become a new process of the same command line, which finds *listeners* by `kept_listeners`.

    The event loop must be open: to close it takes the handlers of signals away, and the next signal would kill.
    """
    flush_log()
    for sock in listeners:
        sock.set_inheritable(True)
    kept = {_KEPT_LISTENERS: " ".join(str(sock.fileno()) for sock in listeners)} if listeners else {}
    os.execve(sys.executable, _same_command(), {**os.environ, **kept})  # noqa: S606 - a list, no shell


def kept_listeners() -> list[socket.socket]:
    """Return the listeners from before a restart in place, which stayed open."""
    kept = [socket.socket(fileno=int(number)) for number in os.environ.pop(_KEPT_LISTENERS, "").split()]
    for sock in kept:
        sock.set_inheritable(False)
    return kept


# ---- workers from before a restart in place, which drain


def child_processes() -> set[int]:
    """Return the children of this process; at the start they are workers from before a restart in place."""
    try:
        return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}
    except OSError:  # a kernel without CONFIG_PROC_CHILDREN
        return set()


async def reap(pids: set[int]) -> None:
    """Wait until the children *pids* have ended, so that no zombie is left."""
    while pids:
        pids = {pid for pid in pids if _is_running_child(pid)}
        await asyncio.sleep(_REAP_EVERY_S)


def _is_running_child(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == 0
    except ChildProcessError:
        return False
