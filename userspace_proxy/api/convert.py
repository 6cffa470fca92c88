"""Convert plain values (from YAML or JSON) to typed structs, with errors that name the field."""

import re
from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any, TypeVar

import msgspec

from userspace_proxy.api.objects import Endpoints, EndpointSlice, Node, Pod, Service, ServiceCIDR
from userspace_proxy.errors import ConfigError

_Wanted = TypeVar("_Wanted")
KubernetesObject = Service | EndpointSlice | Endpoints | Pod | Node | ServiceCIDR

KINDS: dict[str, type[Service | EndpointSlice | Endpoints | Pod | Node]] = {
    "Service": Service,
    "EndpointSlice": EndpointSlice,
    "Endpoints": Endpoints,
    "Pod": Pod,
    "Node": Node,
}

_PLACE = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_QUOTED_CHARACTERS = re.compile(r"[.\[\]]")
_STEP = re.compile(r"\[(?P<index>\d+)\]|\[\"(?P<quoted>[^\"]*)\"\]|(?P<key>[^.\[\]]+)")
_NO_SPACE_AFTER_COLON = re.compile(r"(?:- +)*(?P<key>[A-Za-z][\w.-]*):(?P<value>[^\s/]\S*)")
_NO_SPACE_AFTER_DASH = re.compile(r"-(?P<key>[A-Za-z][\w./-]*):(\s|$)")
_PORT_PAIR = re.compile(r"(\d{1,5}):(\d{1,5})")
# The field that a single value stands for, in lists whose items are mappings.
_KEYS = {
    "ports": "port",
    "addresses": "ip",
    "notReadyAddresses": "ip",
    "podIPs": "ip",
    "ingress": "ip",
    "forZones": "name",
    "forNodes": "name",
    "containers": "name",
}
_WORDS = {
    "str": "text",
    "int": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "a mapping",
    "null": "nothing",
    "float": "a number with a fraction",
}


def convert(kind: str, plain: object) -> KubernetesObject:
    """Return *plain* as the struct of *kind* (a key of KINDS).

    Raises:
        ConfigError: a value has the wrong type, or a required field is missing.
    """
    return convert_to(KINDS[kind], plain)


def convert_to(wanted: type[_Wanted], plain: object, decode: Callable[[type, object], object] | None = None) -> _Wanted:
    """Return *plain* as *wanted*. *decode* converts to types that msgspec does not know.

    Raises:
        ConfigError: as for `convert`.
    """
    try:
        return msgspec.convert(plain, wanted, dec_hook=decode)
    except msgspec.ValidationError as error:
        raise _readable(str(error), plain) from None


# ---- fields as paths


def below(field: str, key: object) -> str:
    """Return the path of *key* in *field*, quoted if the key contains dots or brackets: ``labels["a.b/c"]``."""
    text = str(key)
    if not text or _QUOTED_CHARACTERS.search(text):
        return f'{field}["{text}"]'
    return f"{field}.{text}" if field else text


def field_of(steps: Iterable[str | int]) -> str:
    """Return the path of these keys and indexes; the inverse of `steps`."""
    return reduce(lambda field, step: f"{field}[{step}]" if isinstance(step, int) else below(field, step), steps, "")


def steps(field: str) -> list[str | int]:
    """Split the path *field* into its keys and indexes."""
    return [
        int(step["index"]) if step["index"] else step["key"] if step["quoted"] is None else step["quoted"]
        for step in _STEP.finditer(field)
    ]


# ---- errors


def space_error(text: str, field: str = "") -> ConfigError | None:
    """Return an error if *text*, the value of *field*, lacks the space after the ':' or '-' of its key; else None.

    If *field* is empty, the error names the key instead.
    """
    if match := _NO_SPACE_AFTER_DASH.match(text):
        fix = f"write '- {match['key']}:'"
        return ConfigError("a space is missing after '-'", field=field or match["key"], fix=fix)
    if match := _NO_SPACE_AFTER_COLON.match(text):
        fix = f"write '{match['key']}: {match['value']}'"
        return ConfigError("a space is missing after ':'", field=field or match["key"], fix=fix)
    return None


def key_space_error(key: object, field: str) -> ConfigError | None:
    """Return an error if *key*, the whole of a mapping's key at *field*, lacks a space; else None.

    YAML reads ``-port: 80`` as the key ``-port``, and ``{port:80}`` as the key ``port:80``.
    """
    return space_error(str(key), field) or space_error(f"{key}:", field)


def _readable(message: str, plain: object) -> ConfigError:
    place = _PLACE.search(message)
    field = place["path"] if place else ""
    reason = message[: place.start()] if place else message
    if missing := re.fullmatch(r"Object missing required field `(.*)`", reason):
        return ConfigError(f"lacks the field {missing[1]}", field=field, fix=f"add {missing[1]}")
    # Null is never the intended value, so the message does not offer it.
    reason = re.sub(r"`([^`]*)`", lambda types: _in_words(types[1]), reason).replace("Expected ", "must be ")
    expected, _, got = reason.partition(", got ")
    if field.endswith("[...]"):
        return _wrong_label(field.removesuffix("[...]"), plain)
    value = _value_at(plain, field)
    if expected in ("must be a mapping", "must be a list") and (glued := _glued(value, field)):
        return glued
    fix = _fix(field, expected, got, value)
    return ConfigError(f"{expected}, not {got}" if got else expected, field=field, fix=fix)


# (expected, got) -> fix.
_FIXES = {
    ("must be text", "nothing"): "write a value, or leave it out",
    ("must be a list", "a mapping"): "begin each item with '- '",
    ("must be a mapping", "a list"): "remove the '-'",
    ("must be a mapping", "nothing"): "write its fields below it, or leave it out",
    ("must be true or false", "text"): "write true or false, without quotes",
    ("must be a number", "a number with a fraction"): "write it without a fraction",
}


def _fix(field: str, expected: str, got: str, value: object) -> str:
    """Return how to repair *value* at *field*, which is *got* and not what is *expected*; "" if that is not known."""
    if fix := _FIXES.get((expected, got)):
        return fix
    match expected, got:
        case "must be text", "a list" | "a mapping":
            values = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
            is_single = len(values) == 1 and isinstance(values[0], str)
            return f"write the value alone: {values[0]}" if is_single else "write one value"
        case "must be text", _:
            return "write ClientIP or None" if field.endswith(".sessionAffinity") else "put it in quotes"
        case "must be a list", _:
            return f"write [{value}]" if value is not None else "write its items, each after '- '"
        case "must be a mapping", _:
            return _fix_of_mapping(field, value)
        case "must be a number", "text":
            pair = _PORT_PAIR.fullmatch(str(value)) if field.endswith(".port") else None
            return f"write {_as_pair(pair)}" if pair else "write it in digits, without quotes"
    return ""


def _fix_of_mapping(field: str, value: object) -> str:
    if key := _KEYS.get(re.sub(r"\[\d+\]$", "", field).rpartition(".")[2]):
        pair = _PORT_PAIR.fullmatch(str(value)) if key == "port" else None
        return f"write {_as_pair(pair)}" if pair else f"write '{key}: {value}'"
    label, is_pair, text = str(value).partition("=")
    return f"write '{label}: {text}'" if is_pair else "write its fields below it, each as 'NAME: VALUE'"


def _as_pair(pair: re.Match[str]) -> str:
    return f"port: {pair[1]} and targetPort: {pair[2]}"


def _glued(value: object, field: str) -> ConfigError | None:
    """Return an error if *value* is no mapping or list because a space is missing; else None."""
    if isinstance(value, dict):
        return next((error for key in value if (error := key_space_error(key, field))), None)
    return space_error(value, field) if isinstance(value, str) else None


def _in_words(types: str) -> str:
    names = types.split(" | ")
    wanted = [_WORDS.get(name, name) for name in names if name != "null" or names == ["null"]]
    return " or ".join(wanted)


def _wrong_label(field: str, plain: object) -> ConfigError:
    """Return the error for a mapping whose values must be text. msgspec's message lacks the key, so look it up."""
    key, value = next(((k, v) for k, v in _mapping_at(plain, field).items() if not isinstance(v, str)), ("", None))
    parent = field.rpartition(".")[2]
    if isinstance(value, dict | list):
        fix = f"if {key!r} belongs beside {parent!r}, indent it as {parent!r} is"
        if key in ("matchLabels", "matchExpressions"):
            fix = f"write the labels right under {parent!r}; {key} is for Deployments and their like"
        got = "list" if isinstance(value, list) else "mapping"
        return ConfigError(f"{key!r} under {parent!r} must be text, not a {got}", field=below(field, key), fix=fix)
    if value is None and (glued := key_space_error(key, below(field, key))):
        return glued
    # Do not show the value: YAML may have changed it (1.10 to 1.1, yes to true).
    got = "nothing" if value is None else "true or false" if isinstance(value, bool) else "a number"
    fix = "put the value in quotes" if value is not None else 'write "" where no value is meant'
    return ConfigError(f"the value of {key!r} must be text, not {got}", field=below(field, key), fix=fix)


def _mapping_at(plain: object, field: str) -> dict[Any, Any]:
    value = _value_at(plain, field)
    return value if isinstance(value, dict) else {}


def _value_at(plain: object, field: str) -> object:
    for step in steps(field):
        if isinstance(plain, dict):
            plain = plain.get(step)
        elif isinstance(plain, list) and isinstance(step, int) and step < len(plain):
            plain = plain[step]
        else:
            return None
    return plain
