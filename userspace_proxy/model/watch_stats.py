"""How well a source can follow the API."""

import time
from dataclasses import dataclass


@dataclass(slots=True)
class WatchStats:
    """The state of a source's watch on one kind. Times are wall-clock seconds; counts start at the process's start.

    ``heard_at``: time of the last event or bookmark, None before the first. ``failing_since``: when the watch began to
    fail, None while it works. ``why``: the reason.
    """

    kind: str
    heard_at: float | None = None
    failing_since: float | None = None
    why: str = ""
    events: int = 0
    restarts: int = 0
    relists: int = 0
    expired: int = 0

    def is_dead(self, now: float, after_s: float) -> bool:
        """Return whether the watch has failed for longer than *after_s*."""
        return self.failing_since is not None and now - self.failing_since > after_s

    def failure(self) -> str:
        """Return the failure as text: what fails, since when and why."""
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.failing_since))
        return f"{self.kind} cannot be followed since {since}: {self.why}"
