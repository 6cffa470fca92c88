"""Files that are written at the end of a long run: whole, or as they were before it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def output(path: Path) -> Iterator[Callable[[bytes], object]]:
    """Yield what writes all of *path* at once; unless it is called the file stays what it was.

    The folder is held: whatever lies over its path later, the file is written where it was asked for.

    Raises:
        OSError: it cannot be written there, which is found out at the beginning.
    """
    if path.exists() and not path.is_file():  # a pipe or a terminal: nothing there could be lost
        with path.open("wb") as file:
            yield file.write
        return
    target = path.resolve()  # what a link leads to is written, and the link stays
    if target.exists():
        target.open("ab").close()  # may it be written?
    temporary = f".{target.name}.new"
    folder = os.open(target.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, 0o666, dir_fd=folder)) as file:

            def write(content: bytes) -> None:
                file.write(content)
                file.flush()
                try:
                    os.replace(temporary, target.name, src_dir_fd=folder, dst_dir_fd=folder)
                except OSError as error:
                    if error.errno != errno.EBUSY:
                        raise
                    target.write_bytes(content)  # a file that is a mount of its own cannot be replaced

            yield write
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=folder)
        os.close(folder)
