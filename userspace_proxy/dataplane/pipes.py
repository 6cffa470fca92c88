"""A pool of pipes for splice(2): making a pipe costs more than moving a megabyte through it."""

import contextlib
import fcntl
import os

PIPE_BYTES = 1 << 20
# The kernel shrinks a user's pipes beyond 64 MiB in total (fs.pipe-user-pages-soft).
PIPES_MAX = 48


class Pipe:
    """A pipe, with the number of bytes in it."""

    __slots__ = ("held_bytes", "read_end", "write_end")

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.held_bytes = 0
        with contextlib.suppress(OSError):  # over the user's limit: a smaller pipe works, too
            fcntl.fcntl(self.write_end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def close(self) -> None:
        os.close(self.read_end)
        os.close(self.write_end)


class PipePool:
    """Lends empty pipes. At most PIPES_MAX are lent or idle; ``descriptors`` is the number that these use."""

    def __init__(self) -> None:
        self._idle: list[Pipe] = []
        self.descriptors = 0

    def lend(self) -> Pipe | None:
        """Return an empty pipe, or None at the limit; the caller then copies."""
        if self._idle:
            return self._idle.pop()
        if self.descriptors >= 2 * PIPES_MAX:
            return None
        try:
            pipe = Pipe()
        except OSError:
            return None
        self.descriptors += 2
        return pipe

    def take_back(self, pipe: Pipe) -> None:
        """Return *pipe* to the pool.

        A pipe that still holds bytes is closed: they must never reach another connection.
        """
        if pipe.held_bytes:
            self.descriptors -= 2
            pipe.close()
        else:
            self._idle.append(pipe)

    def shed(self) -> None:
        """Close the idle pipes, because descriptors are short."""
        while self._idle:
            self.descriptors -= 2
            self._idle.pop().close()
