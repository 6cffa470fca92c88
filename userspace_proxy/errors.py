"""The errors that somebody catches by name. Every other failure is a bug and keeps its traceback."""

from __future__ import annotations

from userspace_proxy.printable import printable

# Of a name, a value or a tool's answer, so much is shown.
_SHOWN_MAX = 1_000


class ConfigError(Exception):
    """Something a user wrote is wrong: says what, in which field, and how to mend it.

    ``field`` is a path such as ``spec.ports[0].port`` ("" for the whole object); whoever knows the
    origin of the object turns it into ``file:line``.
    """

    def __init__(self, reason: str, *, field: str = "", mend: str = "") -> None:
        super().__init__(reason)
        self.reason = printable(reason, _SHOWN_MAX)
        self.field = field
        self.mend = printable(mend, _SHOWN_MAX)

    def __str__(self) -> str:
        said = f"{printable(self.field, _SHOWN_MAX)}: {self.reason}" if self.field else self.reason
        return f"{said}; {self.mend}" if self.mend else said


class Note(ConfigError):  # noqa: N818
    """Something about a manifest that is no fault: it is incomplete here, or has no effect."""


class SyncError(Exception):
    """The kernel, or the tool that speaks to it, refused; what was in force before still is."""


class StartError(Exception):
    """The proxy cannot run here: no privilege, a port taken, another instance. One line for stderr."""
