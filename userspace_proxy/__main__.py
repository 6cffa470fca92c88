"""The program. `python -m userspace_proxy` is the same as `userspace-proxy`."""

# The module `signal` takes a while to load, in which Ctrl-C would print a traceback.
import _signal as signal  # type: ignore[import-not-found]


def main() -> None:
    """Run the command line. Until it is loaded Ctrl-C ends the process without a traceback."""
    is_heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_heeded:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from userspace_proxy import cli

    if is_heeded:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


if __name__ == "__main__":
    main()
