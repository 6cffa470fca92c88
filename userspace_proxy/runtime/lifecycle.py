"""From one process to the next: taking over, handing over, starting anew, and how this process ends.

At every moment somebody accepts: who hands over stops when its successor has said that it serves, and who ends without
a decision (a crash) leaves its workers serving.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import NoReturn

from userspace_proxy.admin.health_checks import ServiceHealthChecks
from userspace_proxy.dataplane.handover import Conversation, Incumbent, Inherit, Refused, Released, TakeOver, hand_over
from userspace_proxy.dataplane.process import answers_to
from userspace_proxy.dataplane.remote import RemotePlane
from userspace_proxy.errors import StartError, SyncError
from userspace_proxy.interfaces import DataPlane, ListenerSpec, Proxier
from userspace_proxy.logs import flush_log
from userspace_proxy.runtime.instance_lock import Inheritance

_REAP_EVERY_S = 1.0
# Who is told to stop while it hands over waits so long for the successor to begin, or not.
_DECIDE_S = 2.0
# Names the descriptors of what outlives a start anew.
_LEFT = "USERSPACE_PROXY_LISTENERS"
# Set for a process that is to find out whether a start anew would succeed, and to end.
_REHEARSAL = "USERSPACE_PROXY_REHEARSAL"
_REHEARSAL_S = 30.0
# Longer than it takes to replace a worker that hangs.
_WORKERS_ANSWER_S = 10.0
_DRAINING = "; open connections go on here"
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

log = logging.getLogger(__name__)


class Ending(Enum):
    """STOP: rules away, connections drained. LEFT: the rules stay, by which the kernel serves on. HANDED_OVER: another
    process serves. AGAIN: this one is started anew.
    """

    STOP = "stop"
    LEFT = "left"
    HANDED_OVER = "handed over"
    AGAIN = "again"


class Succession:
    """Who served before, who serves after, and what ends this process.

    ``ending``: how it ends, once that is known; ``stop`` is set with it. ``cut``: ends what drains, once there is a
    plane.
    """

    def __init__(
        self,
        *,
        drain_timeout_s: float,
        orphan_timeout_s: float,
        can_start_anew: bool,
        is_kept_running: bool,
        kernel_serves: bool = False,
    ) -> None:
        """*is_kept_running*: somebody (a kubelet) starts anew whoever of us ends by himself.

        *kernel_serves*: in a kernel mode nobody misses us, from the first load on; there are no listeners to hand over.
        """
        self._drain_timeout_s = drain_timeout_s
        self._orphan_timeout_s = orphan_timeout_s
        self._can_start_anew = can_start_anew
        self._is_kept_running = is_kept_running
        self._kernel_serves = kernel_serves
        self.stop = asyncio.Event()
        self.cut: Callable[[], None] | None = None
        self.ending: Ending | None = None
        self._made_way = asyncio.Event()
        self._released = asyncio.Event()
        self._decided = asyncio.Event()  # not while we hand over: the successor may serve already, or never
        self._decided.set()
        self._hurried = False
        self._told_to_go = asyncio.Event()
        self._keeps_on = False  # workers would serve on without us
        self._plane: DataPlane | None = None
        self._successors = 0
        self._rehearsal: asyncio.Task[None] | None = None
        self._is_left = False  # to a new program of ours, which is about to begin

    def heed_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for signum in _STOPS:
            if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
                continue  # nohup: the terminal may go
            loop.add_signal_handler(signum, self._on_signal, signum)
        loop.add_signal_handler(signal.SIGUSR2, self._on_start_anew)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*_STOPS, signal.SIGUSR2))  # what came while we started anew

    # ---- the one before

    async def inherit(self, plane: DataPlane, inheritance: Inheritance) -> list[ListenerSpec]:
        """Serve at the listeners of whoever served before; return them.

        Raises:
            StartError: they cannot be taken over; who served before goes on.
        """
        self._plane = plane
        if not inheritance.conversations:
            if isinstance(plane, RemotePlane):
                plane.keep_on(inheritance.name)
            return []
        if not inheritance.listeners:  # the kernel serves until our rules are there
            if isinstance(plane, RemotePlane):
                plane.keep_on(inheritance.name)
            await inheritance.taken()
            log.info("taken over from another process; the kernel serves meanwhile")
            return []
        assert isinstance(plane, RemotePlane), "no other asks for it"
        try:
            specs = await plane.adopt(inheritance.listeners)
        except (OSError, SyncError) as error:
            plane.leave()
            inheritance.give_back()
            raise StartError(f"what serves now cannot be taken over, it goes on: {error}") from None
        # Before the others stop accepting, so that a death of ours at any moment leaves somebody who serves.
        with contextlib.suppress(SyncError):  # a worker has died; the next one is told, too
            await answers_to(plane.keep_on(inheritance.name))
        self._keeps_on = True
        await inheritance.taken()
        plane.begin()
        log.info("taken over from another process: %d listeners", len(specs))
        return specs

    async def note_ready(self, ready: asyncio.Event, plane: DataPlane) -> None:
        """From now on there is something that is better left serving than taken away, should we fail."""
        await ready.wait()
        self._keeps_on = self._kernel_serves or isinstance(plane, RemotePlane)

    # ---- the one after

    async def hand_over_to(
        self,
        asked: TakeOver,
        conversation: Conversation,
        proxier: Proxier,
        plane: DataPlane,
        name: socket.socket,
        health_checks: ServiceHealthChecks,
    ) -> None:
        """Give all that we have to who *asked*, and end; or refuse."""
        if not isinstance(plane, RemotePlane) and not self._kernel_serves:
            conversation.send(Refused("it has no workers (--workers 0); stop it first"))
            return
        if self.stop.is_set() or not self._keeps_on:
            conversation.send(Refused("it just begins or ends; try again"))
            return
        self._decided.clear()
        async with proxier.paused():
            try:
                listeners: Iterable[tuple[Inherit, list[int]]] = ()
                if isinstance(plane, RemotePlane):
                    await plane.stats()  # brings the latest pins with it
                    listeners = plane.inheritance()
                checks = health_checks.listeners() if asked.health_checks else ()
                await hand_over(conversation, listeners, name, checks)
                log.info("handed over to process %d%s", asked.pid, "" if self._kernel_serves else _DRAINING)
                is_told_to_stop = self.stop.is_set()
                self.ending = Ending.HANDED_OVER
                self._successors = asked.workers
                self.stop.set()
            finally:
                self._decided.set()
            if is_told_to_stop:
                self._on_signal(signal.SIGTERM)
            await self._made_way.wait()
        conversation.send(Released())
        await conversation.sent()
        self._released.set()

    def _on_signal(self, signum: signal.Signals) -> None:
        if self._is_left:  # too late for us: it waits, blocked, for the new program
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            return
        self._told_to_go.set()
        if not self.stop.is_set() or self.ending is Ending.AGAIN:
            # A service manager's stop is often the first half of a restart. kube-proxy leaves its rules, too.
            if self._kernel_serves and signum is signal.SIGTERM:
                log.info("stopping: rules stay and the kernel serves on; `userspace-proxy cleanup` removes them")
                self.ending = Ending.LEFT
            else:
                log.info("stopping: rules away, then up to %.3g s for open connections", self._drain_timeout_s)
                self.ending = Ending.STOP
            self.stop.set()
        elif self.cut is not None and self.ending is Ending.HANDED_OVER and not self._hurried:
            log.info("up to %.3g s more for open connections", self._drain_timeout_s)
            asyncio.get_running_loop().call_later(self._drain_timeout_s, self.cut)
            self._hurried = True
        elif self.cut is not None:
            log.info("cutting the connections that are left")
            self.cut()

    def _on_start_anew(self) -> None:
        """Replace this process by a new one of the same command line, which takes over from our workers: an upgrade."""
        if self.stop.is_set() or self._rehearsal is not None:
            return
        if not self._keeps_on or not self._can_start_anew:
            log.error("SIGUSR2 is not heeded: not ready yet, --workers 0, or the manifests came from stdin")
            return
        self._rehearsal = asyncio.create_task(self._start_anew(), name="start anew")

    async def _start_anew(self) -> None:
        try:
            obstacle = await _rehearse() or await self._ask_workers()
        finally:
            self._rehearsal = None
        if self.stop.is_set():
            return
        if not self._decided.is_set():
            obstacle = "another process takes over just now"
        if obstacle:
            log.error("SIGUSR2 is not heeded, this process serves on: %s", obstacle)
            return
        log.info("starting anew; workers serve on meanwhile")
        self.ending = Ending.AGAIN
        self.stop.set()

    async def _ask_workers(self) -> str:
        """Return why the new process would find no worker that hands over; "" if all answer."""
        if not isinstance(self._plane, RemotePlane):
            return ""
        try:
            async with asyncio.timeout(_WORKERS_ANSWER_S):
                await self._plane.stats()
        except TimeoutError:
            return "a worker does not answer"
        return self._plane.failing

    # ---- the end

    async def decision(self, incumbent: Incumbent) -> None:
        """Wait until a hand-over under way has been made, or not."""
        if self._rehearsal is not None:
            self._rehearsal.cancel()
            await asyncio.wait({self._rehearsal})
        try:
            async with asyncio.timeout(_DECIDE_S):
                await self._decided.wait()
        except TimeoutError:
            incumbent.give_up()

    async def end(self, plane: DataPlane, take_away: Callable[[], Awaitable[None]]) -> None:
        """End as it was decided; without a decision this is a crash, and what serves goes on where it can.

        *take_away* drains connections and leaves no rule behind.
        """
        if self.ending is Ending.HANDED_OVER:
            self._made_way.set()
            if isinstance(plane, RemotePlane):
                await plane.close(self._orphan_timeout_s, successors=self._successors)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DECIDE_S):
                    await self._released.wait()
            if self._is_kept_running:  # who starts us anew would take back what we gave
                await self._told_to_go.wait()
        elif self.ending is not Ending.STOP and self._keeps_on and isinstance(plane, RemotePlane):
            plane.leave()
        else:
            await take_away()
        if self.ending is Ending.AGAIN:
            self._is_left = True
            # Until the new program can heed them; a stop that came just now would else kill it unheard.
            signal.pthread_sigmask(signal.SIG_BLOCK, (*_STOPS, signal.SIGUSR2))


async def _rehearse() -> str:
    """Run a new process of the same command line up to the moment before it takes over; return what it fails at."""
    try:
        process = subprocess.Popen(  # noqa: ASYNC220 - as workers are started
            _same_command(),
            env={**os.environ, _REHEARSAL: "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        return f"{sys.executable}: {error.strerror}"
    reading = asyncio.get_running_loop().run_in_executor(None, process.communicate)
    try:
        async with asyncio.timeout(_REHEARSAL_S):
            _, said = await asyncio.shield(reading)
    except TimeoutError:
        return f"the new process is not ready after {_REHEARSAL_S:.0f} s"
    finally:
        process.kill()
        await asyncio.wait({reading})
    if not process.returncode:
        return ""
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"the new process exited {process.returncode}"


def is_rehearsal() -> bool:
    return _REHEARSAL in os.environ


def _same_command() -> list[str]:
    safe_path = [] if sys.flags.safe_path else ["-P"]  # what Python itself imports first is not from here either
    return [sys.executable, *safe_path, *sys.orig_argv[1:]]


def start_anew(listeners: Sequence[socket.socket]) -> NoReturn:
    """Become a new process of the same command line, which finds *listeners* as what `was_left`."""
    flush_log()
    for sock in listeners:
        sock.set_inheritable(True)
    left = {_LEFT: " ".join(str(sock.fileno()) for sock in listeners)} if listeners else {}
    os.execve(sys.executable, _same_command(), {**os.environ, **left})  # noqa: S606 - a list, no shell


def was_left() -> list[socket.socket]:
    """Return the listeners from before a start anew: nobody who asked meanwhile was refused."""
    left = [socket.socket(fileno=int(number)) for number in os.environ.pop(_LEFT, "").split()]
    for sock in left:
        sock.set_inheritable(False)
    return left


# ---- what drains from before a start anew


def children() -> set[int]:
    """Return the processes that are children of ours, from before a start anew: what drains there ends some time."""
    try:
        return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}
    except OSError:  # a kernel without CONFIG_PROC_CHILDREN
        return set()


async def reap(left: set[int]) -> None:
    """Wait for them, so that nothing is left of them."""
    while left:
        left = {pid for pid in left if _is_running_child(pid)}
        await asyncio.sleep(_REAP_EVERY_S)


def _is_running_child(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == 0
    except ChildProcessError:
        return False
