"""The program. `python -m userspace_proxy` is the same as `userspace-proxy`."""

# The module `signal` takes a while to load, in which Ctrl-C would print a traceback.
import _signal as signal  # type: ignore[import-not-found]
import atexit
import errno
import gc
import os
import sys


def main() -> None:
    """Run the command line. Ctrl-C ends the process at once; a command that has to clean up sets a handler of its own.

    KeyboardInterrupt is not used: Python loses it if it is raised in a callback of the import system.
    """
    gc.set_threshold(100_000)  # what imports make stays; searching it again and again takes a fifth of a short command
    # A closed stream (`>&-`) becomes /dev/null: otherwise a socket gets its descriptor, and then the output.
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
            if number:
                setattr(sys, name, os.fdopen(number, "w"))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from userspace_proxy import cli

    cli.main()


def run() -> None:
    """Run the command line, and end the process.

    Python would take all modules and objects apart first, which takes a tenth of a second after `run`, and more with
    many Services.
    """
    code = 0
    try:
        try:
            main()
        except SystemExit as end:
            if isinstance(end.code, str):
                raise  # Python prints it
            code = end.code or 0
        sys.stdout.flush()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EPIPE):
            raise
        if error.errno == errno.ENOSPC:
            sys.stderr.write(f"userspace-proxy: the output is not complete: {error.strerror}\n")
        code = 1
    atexit._run_exitfuncs()  # noqa: SLF001 - as Python does it; there is no public way
    os._exit(code)


if __name__ == "__main__":
    run()
