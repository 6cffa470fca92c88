"""One child process, seen from the control process: start it, send requests, and replace it if it dies or hangs."""

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Generic, TypeVar

import msgspec

from userspace_proxy.dataplane.channel import PING, Channel, close_descriptors
from userspace_proxy.dataplane.sockets import closed_on_error
from userspace_proxy.dataplane.watchdog import LOOK_EVERY_S, Watchdog, activity_of
from userspace_proxy.errors import SyncError

_RESPAWN_PAUSE_S = 0.5
# A dying process closes its sockets a moment before its exit is visible; a killed one exits soon.
_END_SEEN_S = 0.3
_KILLED_S = 2.0
_LOOK_FIRST_S, _LOOK_LAST_S = 0.002, 0.1

A = TypeVar("A")
log = logging.getLogger(__name__)


class ChildProcess(Generic[A]):
    """A process that runs *module*, replaced when it dies, hangs or breaks its channel. Its answers have the type A.

    *kind*: what log lines call it. ``restarts``: how often it was replaced. ``failing``: why nothing is served, "" if
    it is. Subclasses restore its state (`replay`) and decode its answers (`read_answer`).
    """

    def __init__(self, kind: str, module: str, settings: msgspec.Struct) -> None:
        self.restarts = 0
        self.failing = ""
        self._kind = kind
        self._command = [sys.executable, "-P", "-m", module]
        self._settings_json = msgspec.json.encode(settings).decode()
        self._waiting: deque[asyncio.Future[A]] = deque()
        self._channel: Channel | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._replaced: list[subprocess.Popen[bytes]] = []  # replaced processes that have not exited yet
        self._closing = False
        self._respawn: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None

    async def replay(self) -> None:
        """Send a replacement the state of the previous process, and clear ``failing``."""
        self.failing = ""

    def read_answer(self, body: bytes) -> A | None:
        """Return the answer to the oldest request, or None if *body* is only a part of an answer, or no answer."""
        raise NotImplementedError

    def forget_parts(self) -> None:
        """Forget the parts of an answer that will not be complete: the process has ended."""

    def start(self) -> None:
        """Start the process, which then accepts requests; raises OSError."""
        ours, theirs = socket.socketpair()
        with theirs, closed_on_error(ours):
            # Its own session: signals from a terminal are for the control process.
            self._process = subprocess.Popen(
                [*self._command, str(theirs.fileno()), self._settings_json],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._channel = Channel(ours, self._on_frame, self._on_close)
        self._watchdog = Watchdog()
        self._owes_ping = False
        if self._watch is None:
            self._watch = asyncio.create_task(self._watch_over(), name=f"watch the {self._kind}")

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    def _on_frame(self, body: bytes, descriptors: list[int]) -> None:
        close_descriptors(descriptors)  # children send none
        if body == PING:
            self._owes_ping = False
            self._watchdog.note_answer()
            return
        try:
            answer = self.read_answer(body)
        except msgspec.DecodeError as error:
            if self._channel is not None:
                self._channel.break_off(f"sent an invalid answer ({error})")
            return
        if answer is not None and self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(answer)

    async def _watch_over(self) -> None:
        """Replace the process if it hangs."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self._replaced = [process for process in self._replaced if process.poll() is None]
            if self._channel is None or self._process is None:
                continue
            if not self._owes_ping:
                self._owes_ping = True
                self._channel.send(PING)
            elif why := self._watchdog.note_silence(activity_of(self.pid)):
                self._process.kill()
                self._channel.break_off(why)

    def _on_close(self) -> None:
        # Until there is another process, requests fail at once: a waiting one would take that one's first answer.
        channel, self._channel = self._channel, None
        self.forget_parts()
        waiting, self._waiting = self._waiting, deque()
        for future in waiting:
            if not future.done():
                future.set_exception(SyncError(f"the {self._kind} process has ended"))
        if not self._closing and self._process is not None:
            broken = channel.broken if channel is not None else ""
            if broken:
                # Before it notices the closed channel, which it would take for the death of this process.
                self._process.terminate()
            self.failing = f"{self._kind} process {self.pid} {broken or 'has ended'}"
            self._begin_to_replace(self._process, broken)

    def _begin_to_replace(self, process: subprocess.Popen[bytes], broken: str) -> None:
        if self._respawn is not None:
            self._respawn.cancel()  # it may repeat to the next process what this one had no room for
        self._respawn = asyncio.create_task(self._replace(process, broken), name=f"replace the {self._kind} process")

    async def _replace(self, process: subprocess.Popen[bytes], broken: str) -> None:
        """Start another process in place of *process*, even if that does not exit: its channel is closed."""
        if not broken:
            code = await exit_code(process, _END_SEEN_S)
            broken = "has closed its channel" if code is None else f"has ended (exit code {code})"
            if code is None:
                process.terminate()
        if process.poll() is None:
            self._replaced.append(process)
        self.restarts += 1
        log.error("%s process %d %s; another one takes its listeners", self._kind, process.pid, broken)
        if self.restarts > 1:
            await asyncio.sleep(_RESPAWN_PAUSE_S)  # back off, in case processes die at once
        await self._start_again()
        with contextlib.suppress(SyncError):  # the new process has ended, too, and is being replaced
            await self.replay()

    async def _start_again(self) -> None:
        logged = ""
        while True:
            try:
                self.start()
            except OSError as error:
                if logged != (logged := str(error)):
                    log.error("no %s process can be started, trying again: %s", self._kind, error)  # noqa: TRY400
                await asyncio.sleep(_RESPAWN_PAUSE_S)
            else:
                return

    def notify(self, request: msgspec.Struct, descriptors: Sequence[int] = ()) -> None:
        """Send *request*, which has no answer. No effect without a process."""
        if self._channel is not None:
            self._channel.send(msgspec.msgpack.encode(request), descriptors)

    def send(self, request: msgspec.Struct, descriptors: Sequence[int] = ()) -> asyncio.Future[A]:
        """Send *request*. The returned future gets the answer, or SyncError if there is no process."""
        future: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        if self._channel is None:
            future.set_exception(SyncError(f"there is no {self._kind} process"))
            return future
        self._waiting.append(future)
        future.add_done_callback(_retrieve)
        self.notify(request, descriptors)
        return future

    def leave(self) -> None:
        """Stop supervising the process, which continues to serve without this one."""
        self.end_tasks()
        if self._channel is not None:
            self._channel.close()

    def end_tasks(self) -> None:
        """Stop the tasks that watch the process, replace it, and replay its state."""
        self._closing = True
        for task in (self._respawn, self._watch):
            if task is not None:
                task.cancel()

    async def sent(self) -> None:
        """Wait until the kernel has accepted all that was sent, with its descriptors."""
        if self._channel is not None:
            await self._channel.sent()

    async def end(self, request: msgspec.Struct, answer_timeout_s: float, exit_timeout_s: float) -> None:
        """Send *request*, which ends the process, and wait for its answer and its exit; then kill it."""
        with contextlib.suppress(SyncError, TimeoutError):
            async with asyncio.timeout(answer_timeout_s):
                await self.send(request)
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            await self.await_exit(self._process, exit_timeout_s)

    async def await_exit(self, process: subprocess.Popen[bytes], timeout_s: float) -> None:
        """Wait for *process* to exit; kill it after *timeout_s*."""
        if await exit_code(process, timeout_s) is None:
            process.kill()
            if await exit_code(process, _KILLED_S) is None:
                log.error("%s process %d has been killed but does not exit", self._kind, process.pid)


async def exit_code(process: subprocess.Popen[bytes], timeout_s: float) -> int | None:
    """Return the exit code of *process*, or None if it still runs: SIGKILL does not end uninterruptible sleep."""
    give_up_at = time.monotonic() + timeout_s
    pause_s = _LOOK_FIRST_S
    while (code := process.poll()) is None and time.monotonic() < give_up_at:
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _LOOK_LAST_S)
    return code


def _retrieve(future: asyncio.Future[A]) -> None:
    """Mark the future's exception as seen: a request without a waiting caller may fail silently."""
    if not future.cancelled():
        future.exception()
