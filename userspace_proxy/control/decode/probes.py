"""Read the health check of a Service from its annotation: a kind and settings, such as ``tcp interval=5s``. Pure."""

import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from userspace_proxy.model.duration import duration
from userspace_proxy.model.probe import ProbeKind, ProbeSpec

_ANNOTATION_MAX = 4_096
# So much is sent in one datagram, or as the path of a request.
_TEXT_MAX = 512
_PORT_MAX = 65_535
_COUNT_MAX = 100
_INTERVAL_MIN_S, _INTERVAL_MAX_S = 0.1, 3_600.0
_TIMEOUT_MIN_S = 0.01
_HEX = "hex:"
_PATH = re.compile(r"/[!-~]*")
_STATUSES = re.compile(r"([1-5]\d\d)(?:-([1-5]\d\d))?")


def read_probe(text: str) -> ProbeSpec:
    """Return the health check that *text* describes.

    Raises:
        ValueError: *text* is not a health check; the message names the wrong part.
    """
    if len(text) > _ANNOTATION_MAX:
        raise ValueError(f"it is longer than {_ANNOTATION_MAX} characters")
    kind, *settings = shlex.split(text) or [""]
    if kind not in list(ProbeKind):
        raise ValueError(f"it begins with {kind!r}, not with one of {', '.join(ProbeKind)}")
    values: dict[str, Any] = {}
    for setting in settings:
        field, value = _read_setting(ProbeKind(kind), setting)
        if field in values:
            raise ValueError(f"{setting.partition('=')[0]!r} is stated twice")
        values[field] = value
    if kind == ProbeKind.UDP and not values.get("send"):
        raise ValueError("udp needs send=, the text of a datagram that the endpoint answers")
    spec = ProbeSpec(ProbeKind(kind), **values)
    if spec.timeout_s <= spec.interval_s:
        return spec
    if "timeout_s" in values:
        raise ValueError("the timeout is longer than the interval")
    return replace(spec, timeout_s=spec.interval_s)


def _read_setting(kind: ProbeKind, setting: str) -> tuple[str, object]:
    """Return the field of ProbeSpec and its value for *setting*, such as ``rise=2``. Raises ValueError."""
    readers = _READERS | _READERS_OF[kind]
    key, is_set, text = setting.partition("=")
    if key not in readers:
        close = get_close_matches(key, readers, n=1)
        hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(readers)}"
        raise ValueError(f"{kind} has no setting {key!r}; {hint}")
    if not is_set:
        raise ValueError(f"{key!r} has no value")
    try:
        return _FIELDS.get(key, key), readers[key](text)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _number(most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and 1 <= int(text) <= most):
            raise ValueError(f"{text!r} is no number from 1 to {most}")
        return int(text)

    return read


def _interval(text: str) -> float:
    if not _INTERVAL_MIN_S <= (seconds := duration(text)) <= _INTERVAL_MAX_S:
        raise ValueError(f"{text!r} is not from 100ms to 1h")
    return seconds


def _timeout(text: str) -> float:
    if not _TIMEOUT_MIN_S <= (seconds := duration(text)) <= _INTERVAL_MAX_S:
        raise ValueError(f"{text!r} is not from 10ms to the interval")
    return seconds


def _switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise ValueError(f"{text!r} is neither on nor off")
    return text == "on"


def _path(text: str) -> str:
    if not _PATH.fullmatch(text) or len(text) > _TEXT_MAX:
        raise ValueError(f"{text!r} is no path of up to {_TEXT_MAX} ASCII characters that begins with /")
    return text


def _statuses(text: str) -> tuple[int, int]:
    found = _STATUSES.fullmatch(text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if first > last:
        raise ValueError(f"{text!r} is no status, such as 200, and no range of them, such as 200-299")
    return first, last


def _payload(text: str) -> bytes:
    try:
        payload = bytes.fromhex(text.removeprefix(_HEX)) if text.startswith(_HEX) else text.encode()
    except ValueError:
        raise ValueError(f"{text!r} is not made of pairs of hexadecimal digits") from None
    if len(payload) > _TEXT_MAX:
        raise ValueError(f"it has {len(payload)} bytes, more than {_TEXT_MAX}")
    return payload


_READERS: dict[str, Callable[[str], object]] = {
    "port": _number(_PORT_MAX),
    "interval": _interval,
    "timeout": _timeout,
    "rise": _number(_COUNT_MAX),
    "fall": _number(_COUNT_MAX),
    "panic": _switch,
}
_READERS_OF: dict[ProbeKind, dict[str, Callable[[str], object]]] = {
    ProbeKind.TCP: {},
    ProbeKind.HTTP: {"path": _path, "status": _statuses},
    ProbeKind.UDP: {"send": _payload, "expect": _payload},
}
# Settings whose field of ProbeSpec has another name.
_FIELDS = {"interval": "interval_s", "timeout": "timeout_s", "status": "statuses"}
