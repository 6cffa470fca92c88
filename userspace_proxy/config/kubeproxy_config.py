"""Read a KubeProxyConfiguration: fields with the same meaning here become settings, other fields are reported.

As in Go, a field that is null or has its type's zero value counts as not set. If the field is a pointer in Go, zero is
a value; its default here is None.
"""

import difflib
import ipaddress
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import yaml

from userspace_proxy import api
from userspace_proxy.config.kinds import Kind
from userspace_proxy.config.settings import HEALTHZ_PORT, KERNEL_MODES, METRICS_PORT, fields_in
from userspace_proxy.errors import ConfigError, StartError
from userspace_proxy.model.duration import duration
from userspace_proxy.sources.documents import split
from userspace_proxy.sources.lines import Lines, Place
from userspace_proxy.sources.paths import UNREADABLE, is_stream, read, read_stream
from userspace_proxy.sources.yaml_faults import describe, keys_that_stand_twice
from userspace_proxy.sources.yaml_values import plain_value

_GROUP, _VERSION, _KIND = "kubeproxy.config.k8s.io", "v1alpha1", "KubeProxyConfiguration"


class Duration(float):
    """Seconds, from a text such as 1m30s."""


# Kind of field -> type and default. Only a field that is a pointer in Go tells zero from unset.
_KINDS: Mapping[str, tuple[Any, Any]] = {
    "text": (str | None, ""),
    "switch": (bool | None, False),
    "number": (int | None, 0),
    "time": (Duration | None, Duration(0)),
    "texts": (list[str] | None, None),
    "switch_pointer": (bool | None, None),
    "number_pointer": (int | None, None),
    "time_pointer": (Duration | None, None),
}


def _section(name: str, *others: tuple[Any, ...], **names: str) -> Any:
    """Return the struct *name*: its fields by kind, and *others* with their types and defaults."""
    fields = [(field, *_KINDS[kind]) for kind, listed in names.items() for field in listed.split()]
    return msgspec.defstruct(name, [*others, *fields], forbid_unknown_fields=True, frozen=True)


# Tables. The formatter would make one line of each kind of field.
# fmt: off
_SECTIONS: Mapping[str, Any] = {
    "clientConnection": _section("ClientConnection", ("qps", float | None, 0),
        text="kubeconfig acceptContentTypes contentType", number="burst"),
    # The last three say how lines are written. kube-proxy prints them, set or not. sanitization: before 1.24.
    "logging": _section("Logging", ("flushFrequency", int | str | None, 0), ("vmodule", list[Any] | None, None),
        ("options", dict[str, Any] | None, None), text="format", number="verbosity", switch="sanitization"),
    "iptables": _section("IPTables", number_pointer="masqueradeBit", switch="masqueradeAll",
        switch_pointer="localhostNodePorts snatNodeInternalIP", time="syncPeriod minSyncPeriod"),
    "ipvs": _section("IPVS", text="scheduler", texts="excludeCIDRs", switch="strictARP",
        time="syncPeriod minSyncPeriod tcpTimeout tcpFinTimeout udpTimeout"),
    "nftables": _section("NFTables", number_pointer="masqueradeBit", switch="masqueradeAll",
        time="syncPeriod minSyncPeriod"),
    "winkernel": _section("Winkernel", text="networkName sourceVip rootHnsEndpointName",
        switch="enableDSR forwardHealthCheckVip"),
    "detectLocal": _section("DetectLocal", text="bridgeInterface interfaceNamePrefix"),
    # max: before 1.18.
    "conntrack": _section("Conntrack", number_pointer="maxPerCore min max", switch="tcpBeLiberal",
        time_pointer="tcpEstablishedTimeout tcpCloseWaitTimeout", time="udpTimeout udpStreamTimeout"),
}
# All fields of kubeproxy.config.k8s.io/v1alpha1, and former ones.
CONFIGURATION = _section(
    _KIND, ("apiVersion", str), ("kind", str), ("featureGates", dict[str, bool] | None, None),
    *((name, section | None, section()) for name, section in _SECTIONS.items()),
    text="hostnameOverride bindAddress healthzBindAddress metricsBindAddress showHiddenMetricsForVersion mode "
    "detectLocalMode clusterCIDR portRange resourceContainer",
    switch="bindAddressHardFail enableProfiling windowsRunAsService", texts="nodePortAddresses",
    number_pointer="oomScoreAdj", time="configSyncPeriod udpIdleTimeout",
)
# fmt: on


@dataclass(slots=True)
class Configuration:
    """A file's content. ``settings``: by their names in Settings. ``named``: fields that have no effect here."""

    settings: dict[str, Any] = field(default_factory=dict)
    named: list[str] = field(default_factory=list)


def read_configuration(path: Path) -> Configuration:
    """Read the KubeProxyConfiguration file *path*.

    Raises:
        StartError: the file cannot be read or is not valid; the message names the line, the field and what to write.
    """
    try:
        text = read_stream(str(path)) if is_stream(str(path)) else read(str(path))
    except UNREADABLE as error:
        raise StartError(f"--config {path}: {getattr(error, 'strerror', None) or error}") from None
    documents = list(split(str(path), text))
    if len(documents) != 1:
        raise StartError(f"--config {path}: it must hold one document, not {len(documents)}")
    (document,) = documents
    try:
        plain, keys_were_lost = plain_value(document.text)
        twice = keys_that_stand_twice(document.text)[1] if keys_were_lost else []
    except yaml.YAMLError as error:
        line, readable = describe(document.text, error)
        raise StartError(f"{path}:{document.line + line}: {readable}") from None
    for line, readable in twice:
        raise StartError(f"{path}:{document.line + line}: {readable}")
    try:
        return _understood(_decode(plain))
    except ConfigError as error:
        raise StartError(f"{path}:{Lines().line_of(Place(document), error.field)}: {error}") from None


# ---- decoding


def _decode(plain: object) -> msgspec.Struct:
    if not isinstance(plain, dict):
        raise ConfigError("this is no KubeProxyConfiguration", fix=f"begin with 'kind: {_KIND}'")
    kind, version = plain.get("kind"), plain.get("apiVersion")
    if kind != _KIND:
        raise ConfigError(f"{kind!r} is no {_KIND}", field="kind", fix=f"write 'kind: {_KIND}'")
    if version != f"{_GROUP}/{_VERSION}":
        raise ConfigError(f"{version!r} is not known", field="apiVersion", fix=f"write {_GROUP}/{_VERSION}")
    try:
        return api.convert_to(CONFIGURATION, plain, _decode_duration)  # type: ignore[no-any-return]
    except ConfigError as error:
        if unknown := re.fullmatch(r"Object contains unknown field (.*)", error.reason):
            _refuse_unknown(error.field, unknown[1])
        raise


def _decode_duration(wanted: type, value: object) -> Duration:
    assert wanted is Duration, wanted
    if not isinstance(value, str):
        raise ValueError(f"must be a duration, not {value!r}; write such as 30s, 1m30s")  # noqa: TRY004 - msgspec's way
    return Duration(duration(value))


def _refuse_unknown(parent: str, name: str) -> NoReturn:
    section = _SECTIONS[parent] if parent else CONFIGURATION  # there is one level of sections
    names = section.__struct_fields__
    close = [n for n in names if n.lower() == name.lower()] or difflib.get_close_matches(name, names, n=1)
    fix = f"did you mean {close[0]}?" if close else f"known here are {', '.join(sorted(names))}"
    raise ConfigError(f"{name!r} is not known", field=api.below(parent, name), fix=fix)


# ---- understanding


# Defaults of addresses to listen at if bindAddress is "::".
_IPV6_ADDRESSES = (
    ("healthz_bind_address", f"[::]:{HEALTHZ_PORT}"),
    ("metrics_bind_address", f"[::1]:{METRICS_PORT}"),
)
# Values that are always in force here.
_AS_WE_DO: list[tuple[str, object]] = [
    ("mode", "userspace"),
    ("iptables.localhostNodePorts", True),
    ("iptables.snatNodeInternalIP", False),
    ("bindAddressHardFail", True),
    ("portRange", "0-0"),  # Go's way to say that there is none
]


def _understood(config: Any) -> Configuration:
    """Return the settings with the meaning of the fields of *config*.

    Raises:
        ConfigError: a value makes no sense.
    """
    understood = Configuration()
    meanings = fields_in(config.mode if config.mode in KERNEL_MODES else "userspace")
    for path, value in _set_fields(config):
        if (path, value) not in _AS_WE_DO:
            try:
                _take_field(understood, meanings, path, value)
            except ValueError as error:
                reason, _, fix = str(error).partition("; ")
                raise ConfigError(reason, field=path, fix=fix) from None
    return understood


def _take_field(understood: Configuration, meanings: Mapping[str, tuple[str, Kind]], path: str, value: Any) -> None:
    """Add the setting that *path* means to *understood*, or name the field. Raises ValueError."""
    if path in meanings:
        name, kind = meanings[path]
        understood.settings[name] = kind.decode(value)
    elif path == "bindAddress" and (address := ipaddress.ip_address(value)).is_unspecified:
        for name, at in _IPV6_ADDRESSES if address.version == 6 else ():
            understood.settings.setdefault(name, at)
    else:
        understood.named.append(f"{path}: {value!r}" if isinstance(value, str) else path)


def _set_fields(section: msgspec.Struct, parent: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the fields that are set, each with its path."""
    for each in msgspec.structs.fields(section):
        value = getattr(section, each.name)
        path = api.below(parent, each.name)
        if each.required or value is None or value in (each.default, [], {}):
            continue
        if isinstance(value, msgspec.Struct):
            yield from _set_fields(value, path)
        elif path not in ("logging.options", "logging.flushFrequency") or _is_meant(value):
            yield path, value


def _is_meant(value: object) -> bool:
    """Return whether anything in *value* is more than kube-proxy writes for nothing (``infoBufferSize: "0"``)."""
    if isinstance(value, dict):
        return any(map(_is_meant, value.values()))
    return value not in (None, "", "0", "0s", 0, False)
