"""The control socket: answers questions about what is served, as JSON over HTTP, to its own user alone.

The socket's file has mode 0600. A request costs the control process time, never a worker more than a fraction of a
millisecond at once. docs/reference/control-socket.md lists paths and fields.
"""

import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import msgspec
from aiohttp import web

from userspace_proxy.errors import StartError
from userspace_proxy.model.answers import VERSION

NAME = "control.sock"
# Questions that are answered at the same time, and characters of a parameter.
_AT_ONCE = 4
_PARAMETER_MAX = 300
_BACKLOG = 64

Question = Callable[[Mapping[str, str]], Awaitable[object]]


class ControlSocket:
    """Answers each of *questions* (path -> its parameters to a value that becomes JSON) until closed."""

    def __init__(self, questions: Mapping[str, Question]) -> None:
        self._questions = questions
        self._runner: web.AppRunner | None = None
        self._path: Path | None = None
        self._inode = 0
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def start(self, path: Path) -> None:
        """Listen at *path*, in place of any socket there.

        Raises:
            StartError: *path* cannot be bound; the message says why.
        """
        try:
            sock, inode = _listen(path)
        except OSError as error:
            raise StartError(f"--control-socket {path}: {error.strerror or error}") from None
        self._path, self._inode = path, inode
        app = web.Application()
        for asked, question in self._questions.items():
            app.router.add_get(f"/v{VERSION}/{asked}", self._handler(question))
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await self._runner.setup()
        await web.SockSite(self._runner, sock).start()

    def _handler(self, question: Question) -> Callable[[web.Request], Awaitable[web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            given = {key: value[:_PARAMETER_MAX] for key, value in request.query.items()}
            try:
                async with self._turns:
                    return _json(200, await question(given))
            except ValueError as error:
                return _json(400, {"error": str(error)})
            except LookupError as error:
                return _json(404, {"error": str(error.args[0] if error.args else error)})

        return handle

    async def close(self) -> None:
        """Stop listening, and remove the file unless another process has replaced it."""
        if self._runner is not None:
            await self._runner.cleanup()
        if self._path is not None:
            with contextlib.suppress(OSError):
                if self._path.stat().st_ino == self._inode:
                    self._path.unlink()


def _json(status: int, answer: object) -> web.Response:
    items = {"items": answer} if isinstance(answer, list) else msgspec.to_builtins(answer)
    body = {"version": VERSION, **items}
    return web.Response(status=status, body=msgspec.json.encode(body) + b"\n", content_type="application/json")


def _listen(path: Path) -> tuple[socket.socket, int]:
    """Return a socket that listens at *path*, and its inode. The file appears at once, with its mode."""
    sock = socket.socket(socket.AF_UNIX)
    folder = -1
    try:
        os.fchmod(sock.fileno(), 0o600)  # the file gets this mode (unix_bind_bsd in net/unix/af_unix.c)
        folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
        temporary = f"{path.name}.{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.stat(path.name, dir_fd=folder, follow_symlinks=False).st_mode):
                raise FileExistsError(errno.EEXIST, "there is something that is no socket")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=folder)
        sock.bind(f"/proc/self/fd/{folder}/{temporary}")  # the path itself may be too long for an address
        sock.listen(_BACKLOG)
        inode = os.stat(temporary, dir_fd=folder).st_ino
        os.rename(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError:
        sock.close()
        raise
    finally:
        if folder >= 0:
            os.close(folder)
    return sock, inode
