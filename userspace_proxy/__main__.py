"""The program. `python -m userspace_proxy` is the same as `userspace-proxy`."""

# The module `signal` takes a while to load, in which Ctrl-C would print a traceback.
import _signal as signal  # type: ignore[import-not-found]


def main() -> None:
    """Run the command line. Ctrl-C ends the process at once; a command that has to clean up sets a handler of its own.

    KeyboardInterrupt is not used: Python loses it if it is raised in a callback of the import system.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from userspace_proxy import cli

    cli.main()


if __name__ == "__main__":
    main()
