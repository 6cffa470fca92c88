"""Durations as Go writes them, in flags, files and annotations. Pure."""

import re

_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(?P<number>\d+\.?\d*|\.\d+)(?P<unit>ns|us|µs|μs|ms|s|m|h)")


def duration(text: str) -> float:
    """Return the seconds of a duration as Go writes it: 30s, 1h0m0s, 250ms, 0.

    Raises:
        ValueError: *text* is not a duration; the message says what to write.
    """
    if text == "0":
        return 0.0
    parts = list(_DURATION.finditer(text))
    if not parts or "".join(part[0] for part in parts) != text:
        raise ValueError(f"{text!r} is no duration; write such as 250ms, 30s, 1m30s, 24h")
    return sum(float(part["number"]) * _UNITS_S[part["unit"]] for part in parts)
