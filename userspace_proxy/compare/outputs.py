"""Output files of a long run: replaced as a whole at its end, or left unchanged."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def output(path: Path) -> Iterator[Callable[[bytes], object]]:
    """Yield a function that writes all of *path* at once; if it is not called, the file stays unchanged.

    The folder is opened at the beginning, so a later mount over its path has no effect.

    Raises:
        OSError: *path* cannot be written; raised on entry, before the block runs.
    """
    if path.exists() and not path.is_file():  # a pipe or a terminal: there is no old content to keep
        with path.open("wb") as file:
            yield file.write
        return
    target = path.resolve()  # write to a link's target and keep the link
    if target.exists():
        target.open("ab").close()  # raises if it is not writable
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
                    target.write_bytes(content)  # a mount point cannot be replaced

            yield write
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=folder)
        os.close(folder)
