"""Plain values (from YAML or JSON) -> typed structs, with errors that name the field."""

from __future__ import annotations

import re

import msgspec

from userspace_proxy.api.objects import Endpoints, EndpointSlice, Node, Pod, Service
from userspace_proxy.errors import ConfigError

KubernetesObject = Service | EndpointSlice | Endpoints | Pod | Node

KINDS: dict[str, type[Service | EndpointSlice | Endpoints | Pod | Node]] = {
    "Service": Service,
    "EndpointSlice": EndpointSlice,
    "Endpoints": Endpoints,
    "Pod": Pod,
    "Node": Node,
}

_PLACE = re.compile(r" - at `(?:key in )?\$\.?(?P<path>[^`]*)`$")
_READABLE = {
    "`str`": "text",
    "`int`": "a number",
    "`bool`": "true or false",
    "`array`": "a list",
    "`object`": "a mapping",
    "`null`": "nothing",
    "`float`": "a number with a fraction",
}


def convert(kind: str, plain: object) -> KubernetesObject:
    """Return *plain* as the struct of *kind* (a key of KINDS).

    Raises:
        ConfigError: a value has the wrong type, or a field that cannot be done without is missing.
    """
    try:
        return msgspec.convert(plain, KINDS[kind])
    except msgspec.ValidationError as error:
        raise _readable(str(error)) from None


def _readable(message: str) -> ConfigError:
    place = _PLACE.search(message)
    field = place["path"] if place else ""
    reason = message[: place.start()] if place else message
    for name, words in _READABLE.items():
        reason = reason.replace(name, words)
    reason = reason.replace("Expected ", "must be ").replace(", got ", ", not ").replace(" | nothing", "")
    reason = reason.replace("Object missing required field", "lacks the field").replace(" | ", " or ")
    mend = ""
    if "must be text" in reason and ("labels" in field or "selector" in field or "annotations" in field):
        mend = "put the value in quotes"
    return ConfigError(reason, field=field, mend=mend)
