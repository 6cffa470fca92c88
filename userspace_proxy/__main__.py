"""The program. `python -m userspace_proxy` is the same as `userspace-proxy`."""

# The module `signal` takes a while to load, in which Ctrl-C would print a traceback.
import _signal as signal  # type: ignore[import-not-found]
import os
import sys


def main() -> None:
    """Run the command line. Ctrl-C ends the process at once; a command that has to clean up sets a handler of its own.

    KeyboardInterrupt is not used: Python loses it if it is raised in a callback of the import system.
    """
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


if __name__ == "__main__":
    main()
