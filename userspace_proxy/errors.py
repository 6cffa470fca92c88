"""Errors that are caught by name. Any other exception is a bug and keeps its traceback."""

from userspace_proxy.printable import printable

# Characters shown of a name, a value or the output of a tool.
_SHOWN_MAX = 1_000


class ConfigError(Exception):
    """Invalid user input: what is wrong, in which field, and how to fix it.

    ``field`` is a path such as ``spec.ports[0].port``, or "" for the whole object. Code that knows the origin of the
    object turns it into ``file:line``.
    """

    def __init__(self, reason: str, *, field: str = "", fix: str = "") -> None:
        super().__init__(reason)
        self.reason = printable(reason, _SHOWN_MAX)
        self.field = field
        self.fix = printable(fix, _SHOWN_MAX)

    def __str__(self) -> str:
        text = f"{printable(self.field, _SHOWN_MAX)}: {self.reason}" if self.field else self.reason
        return f"{text}; {self.fix}" if self.fix else text


class Note(ConfigError):  # noqa: N818
    """A remark on a manifest that is no error: a part is missing here or has no effect."""


class SyncError(Exception):
    """The kernel or a tool refused a change. The previous state stays in force."""


class NotRunError(SyncError):
    """A tool could not be started, or did not end in time. This says nothing about the change."""


class StartError(Exception):
    """The proxy cannot start here (missing privilege, port in use, another instance). Shown as one line on stderr."""
