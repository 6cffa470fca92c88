"""This proxy's annotations on a Service: endpoints, source IP, balancing, health check, connections. Pure.

An annotation is one entry of the table below, and a field of `ServiceAnnotations`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from userspace_proxy import api
from userspace_proxy.control.decode.addresses import canonical_ip
from userspace_proxy.control.decode.probes import read_probe
from userspace_proxy.errors import ConfigError
from userspace_proxy.model.duration import duration
from userspace_proxy.model.probe import ProbeSpec
from userspace_proxy.model.service import IPVS_SCHEDULERS, WEIGHT_MAX, Balance, ConnectionPolicy, SourceIP, Weights

ANNOTATION_PREFIX = "userspace-proxy/"
HEALTH_CHECK = f"{ANNOTATION_PREFIX}health-check"
SOURCE_IP_FIELD = api.below("metadata.annotations", f"{ANNOTATION_PREFIX}source-ip")
ENDPOINTS_FROM = f"{ANNOTATION_PREFIX}endpoints-from"

_DNS_TARGET = re.compile(r"dns://(?P<name>[\w-]{1,63}(\.[\w-]{1,63})*)\.?(:(?P<port>\d{1,5}))?", re.ASCII)
_DNS_NAME_MAX = 253
_WEIGHT = re.compile(r"\s*(?P<ip>[^=\s]+)\s*=\s*(?P<weight>\d{1,3})\s*")
_PORT_MAX = 65_535
_DURATION_MAX_S = 365 * 86_400.0

_policy = lru_cache(maxsize=64)(ConnectionPolicy)  # most Services have the same one


class DnsTarget(NamedTuple):
    """A name whose addresses are endpoints, and their port; port 0 stands for the target port of each service port."""

    name: str
    port: int


@dataclass(frozen=True, slots=True)
class ServiceAnnotations:
    """The values of a Service's annotations; an annotation that is absent or invalid has its default.

    ``source_ip`` and ``balance``: None for the default of the node or the mode. ``weights``: by endpoint IP; others
    have weight 1. ``drain_s``: the time for connections to a removed endpoint, None if they are kept. ``age``: the
    maximum age of connections in seconds (0 for none), and the further seconds until they are reset (None for never).
    ``dns_target``: the name whose addresses are endpoints.
    """

    source_ip: SourceIP | None = None
    balance: Balance | None = None
    weights: Weights = ()
    slow_start_s: float = 0.0
    ipvs_scheduler: str = ""
    probe: ProbeSpec | None = None
    drain_s: float | None = None
    age: tuple[float, float | None] = (0.0, None)
    wait_s: float = 0.0
    dns_target: DnsTarget | None = None

    @property
    def connections(self) -> ConnectionPolicy:
        return _policy(self.drain_s, *self.age, self.wait_s)


def read_annotations(service: api.Service) -> tuple[ServiceAnnotations, list[ConfigError]]:
    """Return the values of this proxy's annotations on *service*, and an error for each that is invalid."""
    values: dict[str, Any] = {}
    problems = []
    given = service.metadata.annotations or {}
    for name in filter(given.__contains__, ANNOTATIONS):
        text, entry = given[name], _TABLE[name]
        try:
            values[entry.field] = entry.read(text)
        except ValueError as error:
            reason = f"{text!r} {entry.wrong}{f': {error}' if name == HEALTH_CHECK else ''}"
            problems.append(ConfigError(reason, field=api.below("metadata.annotations", name), fix=entry.fix))
    if "dns_target" in values and service.spec is not None and service.spec.selector:
        reason, fix = "it has no effect beside a selector, whose Pods are the endpoints", "remove one of the two"
        problems.append(ConfigError(reason, field=api.below("metadata.annotations", ENDPOINTS_FROM), fix=fix))
    return ServiceAnnotations(**values), problems


def dns_target(service: api.Service) -> DnsTarget | None:
    """Return the name that gives *service* its endpoints; None if it has a selector or no valid annotation for that."""
    given = service.metadata.annotations or {}
    if ENDPOINTS_FROM not in given or service.spec is None or service.spec.selector:
        return None
    return read_annotations(service)[0].dns_target


# ---- how texts are read; each function raises ValueError


def _scheduler(text: str) -> str:
    if text not in IPVS_SCHEDULERS:
        raise ValueError(text)
    return text


def _weights(text: str) -> Weights:
    found = {}
    for item in filter(str.strip, text.split(",")):
        matched = _WEIGHT.fullmatch(item)
        if matched is None or int(matched["weight"]) > WEIGHT_MAX:
            raise ValueError(item)
        try:
            found[canonical_ip(matched["ip"])] = int(matched["weight"])
        except ConfigError as error:
            raise ValueError(item) from error
    return tuple(found.items())


def _removal(text: str) -> float | None:
    if text == "keep":
        return None
    return 0.0 if text == "reset" else _setting(text, "drain")


def _age(text: str) -> tuple[float, float | None]:
    age, comma, force = text.partition(",")
    return _limited(age.strip()), _setting(force.strip(), "force") if comma else None


def _limited(text: str) -> float:
    """Return the seconds of the duration *text*, which is a year at most."""
    if (seconds := duration(text)) > _DURATION_MAX_S:
        raise ValueError(text)
    return seconds


def _setting(text: str, name: str) -> float:
    """Return the seconds of *text*, such as ``drain=30s``."""
    key, _, value = text.partition("=")
    if key.strip() != name:
        raise ValueError(text)
    return _limited(value.strip())


def _target(text: str) -> DnsTarget:
    matched = _DNS_TARGET.fullmatch(text)
    if matched is None or len(matched["name"]) > _DNS_NAME_MAX or not 0 < int(matched["port"] or 1) <= _PORT_MAX:
        raise ValueError(text)
    return DnsTarget(matched["name"].lower(), int(matched["port"] or 0))


class _Entry(NamedTuple):
    """The field of ServiceAnnotations, how a text is read, what to say of an invalid one, and how to repair it."""

    field: str
    read: Callable[[str], object]
    wrong: str
    fix: str


# A table. The formatter would make six lines of each entry.
# fmt: off
_TABLE = {
    f"{ANNOTATION_PREFIX}source-ip": _Entry("source_ip", SourceIP, "says no source IP",
        f"write one of {', '.join(SourceIP)}; until then the node's default applies"),
    f"{ANNOTATION_PREFIX}balance": _Entry("balance", Balance, "is no balancing algorithm",
        f"write one of {', '.join(Balance)}; until then the mode's default applies"),
    f"{ANNOTATION_PREFIX}ipvs-scheduler": _Entry("ipvs_scheduler", _scheduler, "is no scheduler of IPVS",
        f"write one of {', '.join(IPVS_SCHEDULERS)}; until then the node's default applies"),
    f"{ANNOTATION_PREFIX}weights": _Entry("weights", _weights, "says no weights",
        f"write such as '10.244.0.5=3, 10.244.0.6=1', weights up to {WEIGHT_MAX}; until then all weigh the same"),
    f"{ANNOTATION_PREFIX}slow-start": _Entry("slow_start_s", duration, "is no duration",
        "write a duration such as 30s; until then new endpoints get their whole share at once"),
    HEALTH_CHECK: _Entry("probe", read_probe, "is no health check",
        "write such as 'http path=/healthz interval=2s fall=3'; until then its endpoints are not probed"),
    f"{ANNOTATION_PREFIX}on-endpoint-removal": _Entry("drain_s", _removal,
        "is no way to treat connections of a removed endpoint",
        "write keep, reset, or such as drain=30s; until then they are kept"),
    f"{ANNOTATION_PREFIX}max-connection-age": _Entry("age", _age, "is no age of connections",
        "write such as '1h', or '1h, force=5m'; until then connections of any age are kept"),
    f"{ANNOTATION_PREFIX}wait-for-endpoints": _Entry("wait_s", _limited, "is no time for which connections can wait",
        "write such as 30s; until then they are refused while there is no endpoint"),
    ENDPOINTS_FROM: _Entry("dns_target", _target, "names no source of endpoints",
        "write such as 'dns://web:8080', or 'dns://web' for the target port; until then no name is resolved"),
}
# fmt: on
ANNOTATIONS = tuple(_TABLE)
