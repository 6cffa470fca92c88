"""This proxy's annotations on a Service: source IP, balancing, health check and how long connections live. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from userspace_proxy import api
from userspace_proxy.control.decode.addresses import canonical_ip
from userspace_proxy.control.decode.probes import read_probe
from userspace_proxy.errors import ConfigError
from userspace_proxy.model.duration import duration
from userspace_proxy.model.probe import ProbeSpec
from userspace_proxy.model.service import IPVS_SCHEDULERS, WEIGHT_MAX, Balance, ConnectionPolicy, SourceIP, Weights

ANNOTATION_PREFIX = "userspace-proxy/"
SOURCE_IP = f"{ANNOTATION_PREFIX}source-ip"
IPVS_SCHEDULER = f"{ANNOTATION_PREFIX}ipvs-scheduler"
WEIGHTS = f"{ANNOTATION_PREFIX}weights"
BALANCE = f"{ANNOTATION_PREFIX}balance"
SLOW_START = f"{ANNOTATION_PREFIX}slow-start"
HEALTH_CHECK = f"{ANNOTATION_PREFIX}health-check"
ON_ENDPOINT_REMOVAL = f"{ANNOTATION_PREFIX}on-endpoint-removal"
MAX_CONNECTION_AGE = f"{ANNOTATION_PREFIX}max-connection-age"
WAIT_FOR_ENDPOINTS = f"{ANNOTATION_PREFIX}wait-for-endpoints"
ANNOTATIONS = (
    SOURCE_IP,
    BALANCE,
    WEIGHTS,
    SLOW_START,
    IPVS_SCHEDULER,
    HEALTH_CHECK,
    ON_ENDPOINT_REMOVAL,
    MAX_CONNECTION_AGE,
    WAIT_FOR_ENDPOINTS,
)
SOURCE_IP_FIELD = api.below("metadata.annotations", SOURCE_IP)

_WEIGHT = re.compile(r"\s*(?P<ip>[^=\s]+)\s*=\s*(?P<weight>\d{1,3})\s*")

_DURATION_MAX_S = 365 * 86_400.0

_Stated = TypeVar("_Stated")


def stated_source_ip(service: api.Service) -> tuple[SourceIP | None, list[ConfigError]]:
    """Return the source IP setting that *service* states, or None if it states none or an invalid one."""
    mend = f"write one of {', '.join(SourceIP)}; until then the node's default applies"
    return _stated(service, SOURCE_IP, SourceIP, "says no source IP", mend)


def stated_balance(service: api.Service) -> tuple[Balance | None, list[ConfigError]]:
    """Return the balancing algorithm that *service* states, or None if it states none or an unknown one."""
    mend = f"write one of {', '.join(Balance)}; until then the mode's default applies"
    return _stated(service, BALANCE, Balance, "is no balancing algorithm", mend)


def stated_slow_start(service: api.Service) -> tuple[float | None, list[ConfigError]]:
    """Return the seconds of slow start that *service* states, or None if it states none or no duration."""
    mend = "write a duration such as 30s; until then new endpoints get their whole share at once"
    return _stated(service, SLOW_START, duration, "is no duration", mend)


def stated_scheduler(service: api.Service) -> tuple[str | None, list[ConfigError]]:
    """Return the IPVS scheduler that *service* states, or None if it states none or an unknown one."""

    def read(text: str) -> str:
        if text not in IPVS_SCHEDULERS:
            raise ValueError(text)
        return text

    mend = f"write one of {', '.join(IPVS_SCHEDULERS)}; until then the node's default applies"
    return _stated(service, IPVS_SCHEDULER, read, "is no scheduler of IPVS", mend)


def stated_weights(service: api.Service) -> tuple[Weights | None, list[ConfigError]]:
    """Return the weights that *service* states, by endpoint IP; endpoints that are not listed have weight 1."""

    def read(text: str) -> Weights:
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

    mend = f"write such as '10.244.0.5=3, 10.244.0.6=1', weights up to {WEIGHT_MAX}; until then all weigh the same"
    return _stated(service, WEIGHTS, read, "says no weights", mend)


def stated_probe(service: api.Service) -> tuple[ProbeSpec | None, list[ConfigError]]:
    """Return the health check that *service* states, or None if it states none or an invalid one."""
    given = (service.metadata.annotations or {}).get(HEALTH_CHECK)
    try:
        return (None if given is None else read_probe(given)), []
    except ValueError as error:
        mend = "write such as 'http path=/healthz interval=2s fall=3'; until then its endpoints are not probed"
        field = api.below("metadata.annotations", HEALTH_CHECK)
        return None, [ConfigError(f"{given!r} is no health check: {error}", field=field, mend=mend)]


def stated_connection_policy(service: api.Service) -> tuple[ConnectionPolicy, list[ConfigError]]:
    """Return how long connections of *service* wait and live. An invalid part is reported and has its default."""

    def read_removal(text: str) -> float | None:
        if text == "keep":
            return None
        return 0.0 if text == "reset" else _setting(text, "drain")

    def read_age(text: str) -> tuple[float, float | None]:
        age, comma, force = text.partition(",")
        return _limited(age.strip()), _setting(force.strip(), "force") if comma else None

    drain_s, problems = _stated(
        service, ON_ENDPOINT_REMOVAL, read_removal, "is no way to treat connections of a removed endpoint",
        "write keep, reset, or such as drain=30s; until then they are kept",
    )  # fmt: skip
    age, age_problems = _stated(
        service, MAX_CONNECTION_AGE, read_age, "is no age of connections",
        "write such as '1h', or '1h, force=5m'; until then connections of any age are kept",
    )  # fmt: skip
    wait_s, wait_problems = _stated(
        service, WAIT_FOR_ENDPOINTS, _limited, "is no time for which connections can wait",
        "write such as 30s; until then they are refused while there is no endpoint",
    )  # fmt: skip
    max_age_s, force_s = age or (0.0, None)
    return ConnectionPolicy(drain_s, max_age_s, force_s, wait_s or 0.0), problems + age_problems + wait_problems


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


def _stated(
    service: api.Service, name: str, read: Callable[[str], _Stated], wrong: str, mend: str
) -> tuple[_Stated | None, list[ConfigError]]:
    given = (service.metadata.annotations or {}).get(name)
    if given is None:
        return None, []
    try:
        return read(given), []
    except ValueError:
        return None, [ConfigError(f"{given!r} {wrong}", field=api.below("metadata.annotations", name), mend=mend)]
