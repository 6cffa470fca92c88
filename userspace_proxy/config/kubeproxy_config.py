"""Read a KubeProxyConfiguration: fields with the same meaning here become settings, other fields are reported.

As in Go, what is null or its type's zero value is not set; only where Go has a pointer is a zero a value (that one
is None by default here).
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import yaml

from userspace_proxy import api
from userspace_proxy.config.settings import HEALTHZ_PORT, KERNEL_MODES, METRICS_PORT, fields_in
from userspace_proxy.errors import ConfigError, StartError
from userspace_proxy.model.duration import duration
from userspace_proxy.sources.documents import split
from userspace_proxy.sources.lines import Lines, Place
from userspace_proxy.sources.paths import UNREADABLE, is_stream, read, read_stream
from userspace_proxy.sources.yaml_faults import describe, keys_that_stand_twice
from userspace_proxy.sources.yaml_values import plain_value

_GROUP, _VERSION, _KIND = "kubeproxy.config.k8s.io", "v1alpha1", "KubeProxyConfiguration"
_INITIALISMS = {"arp": "ARP", "cidr": "CIDR", "cidrs": "CIDRs", "dsr": "DSR", "ip": "IP"}


def _go_name(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(_INITIALISMS.get(word) or word.capitalize() for word in rest)


class Duration(float):
    """Seconds, from a text such as 1m30s."""


class _Section(msgspec.Struct, rename=_go_name, forbid_unknown_fields=True, frozen=True):
    pass


class ClientConnection(_Section, frozen=True):
    kubeconfig: str | None = ""
    accept_content_types: str | None = ""
    content_type: str | None = ""
    qps: float | None = 0
    burst: int | None = 0


class Logging(_Section, frozen=True):
    format: str | None = ""
    verbosity: int | None = 0
    # Of how lines get to where they are logged: kube-proxy writes these into the file it prints, set or not.
    flush_frequency: int | str | None = 0
    vmodule: list[Any] | None = None
    options: dict[str, Any] | None = None
    sanitization: bool | None = False  # before 1.24


class Conntrack(_Section, frozen=True):
    max_per_core: int | None = None
    min: int | None = None
    tcp_established_timeout: Duration | None = None
    tcp_close_wait_timeout: Duration | None = None
    tcp_be_liberal: bool | None = False
    udp_timeout: Duration | None = Duration(0)
    udp_stream_timeout: Duration | None = Duration(0)
    max: int | None = None  # before 1.18


class DetectLocal(_Section, frozen=True):
    bridge_interface: str | None = ""
    interface_name_prefix: str | None = ""


class IPTables(_Section, frozen=True):
    masquerade_bit: int | None = None
    masquerade_all: bool | None = False
    localhost_node_ports: bool | None = None
    snat_node_internal_ip: bool | None = None
    sync_period: Duration | None = Duration(0)
    min_sync_period: Duration | None = Duration(0)


class NFTables(_Section, frozen=True):
    masquerade_bit: int | None = None
    masquerade_all: bool | None = False
    sync_period: Duration | None = Duration(0)
    min_sync_period: Duration | None = Duration(0)


class IPVS(_Section, frozen=True):
    sync_period: Duration | None = Duration(0)
    min_sync_period: Duration | None = Duration(0)
    scheduler: str | None = ""
    exclude_cidrs: list[str] | None = None
    strict_arp: bool | None = False
    tcp_timeout: Duration | None = Duration(0)
    tcp_fin_timeout: Duration | None = Duration(0)
    udp_timeout: Duration | None = Duration(0)


class Winkernel(_Section, frozen=True):
    network_name: str | None = ""
    source_vip: str | None = ""
    enable_dsr: bool | None = False
    root_hns_endpoint_name: str | None = ""
    forward_health_check_vip: bool | None = False


class KubeProxyConfiguration(_Section, frozen=True):
    """All fields of kubeproxy.config.k8s.io/v1alpha1, those included that it had once."""

    api_version: str
    kind: str
    feature_gates: dict[str, bool] | None = None
    client_connection: ClientConnection | None = ClientConnection()
    logging: Logging | None = Logging()
    hostname_override: str | None = ""
    bind_address: str | None = ""
    healthz_bind_address: str | None = ""
    metrics_bind_address: str | None = ""
    bind_address_hard_fail: bool | None = False
    enable_profiling: bool | None = False
    show_hidden_metrics_for_version: str | None = ""
    mode: str | None = ""
    iptables: IPTables | None = IPTables()
    ipvs: IPVS | None = IPVS()
    nftables: NFTables | None = NFTables()
    winkernel: Winkernel | None = Winkernel()
    detect_local_mode: str | None = ""
    detect_local: DetectLocal | None = DetectLocal()
    cluster_cidr: str | None = msgspec.field(default="", name="clusterCIDR")
    node_port_addresses: list[str] | None = None
    oom_score_adj: int | None = None
    conntrack: Conntrack | None = Conntrack()
    config_sync_period: Duration | None = Duration(0)
    port_range: str | None = ""
    windows_run_as_service: bool | None = False
    # Of the userspace mode that was.
    udp_idle_timeout: Duration | None = Duration(0)
    resource_container: str | None = ""


@dataclass(slots=True)
class Configuration:
    """``settings``: by their names in Settings. ``named``: fields that are set and have no meaning here."""

    settings: dict[str, Any] = field(default_factory=dict)
    named: list[str] = field(default_factory=list)


def read_configuration(path: Path) -> Configuration:
    """Return what the file says.

    Raises:
        StartError: it cannot be read, or is no KubeProxyConfiguration; names the line, the field and what to write.
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
        line, said = describe(document.text, error)
        raise StartError(f"{path}:{document.line + line}: {said}") from None
    for line, said in twice:
        raise StartError(f"{path}:{document.line + line}: {said}")
    try:
        return understand(_decode(plain))
    except ConfigError as error:
        raise StartError(f"{path}:{Lines().line_of(Place(document), error.field)}: {error}") from None


# ---- decoding


def _decode(plain: object) -> KubeProxyConfiguration:
    if not isinstance(plain, dict):
        raise ConfigError("this is no KubeProxyConfiguration", mend=f"begin with 'kind: {_KIND}'")
    kind, version = plain.get("kind"), plain.get("apiVersion")
    if kind != _KIND:
        raise ConfigError(f"{kind!r} is no {_KIND}", field="kind", mend=f"write 'kind: {_KIND}'")
    if version != f"{_GROUP}/{_VERSION}":
        raise ConfigError(f"{version!r} is not known", field="apiVersion", mend=f"write {_GROUP}/{_VERSION}")
    try:
        return api.convert_to(KubeProxyConfiguration, plain, _decode_duration)
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
    known = [f.encode_name for f in msgspec.structs.fields(_type_at(parent))]
    close = [n for n in known if n.lower() == name.lower()] or difflib.get_close_matches(name, known, n=1)
    mend = f"did you mean {close[0]}?" if close else f"known here are {', '.join(sorted(known))}"
    raise ConfigError(f"{name!r} is not known", field=api.below(parent, name), mend=mend)


def _type_at(parent: str) -> type[msgspec.Struct]:
    """Return the struct at the path *parent*; there is one level of them."""
    found: Any = KubeProxyConfiguration
    if parent:
        found = type(next(f.default for f in msgspec.structs.fields(found) if f.encode_name == parent))
    return found  # type: ignore[no-any-return]


# ---- understanding


# What is so here whether it is asked for or not.
_AS_WE_DO: list[tuple[str, object]] = [
    ("mode", "userspace"),
    ("iptables.localhostNodePorts", True),
    ("iptables.snatNodeInternalIP", False),
    ("bindAddressHardFail", True),
    ("portRange", "0-0"),  # Go's way to say that there is none
]


def understand(config: KubeProxyConfiguration) -> Configuration:
    """Return the settings that *config* means.

    Raises:
        ConfigError: a value makes no sense.
    """
    understood = Configuration()
    meanings = fields_in(config.mode if config.mode in KERNEL_MODES else "userspace")
    for path, value in _set_fields(config):
        try:
            if (path, value) in _AS_WE_DO:
                continue
            if path in meanings:
                name, kind = meanings[path]
                understood.settings[name] = kind.decode(value)
            elif path == "bindAddress" and (address := ipaddress.ip_address(value)).is_unspecified:
                if address.version == 6:
                    understood.settings.setdefault("healthz_bind_address", f"[::]:{HEALTHZ_PORT}")
                    understood.settings.setdefault("metrics_bind_address", f"[::1]:{METRICS_PORT}")
            else:
                understood.named.append(f"{path}: {value!r}" if isinstance(value, str) else path)
        except ValueError as error:
            reason, _, mend = str(error).partition("; ")
            raise ConfigError(reason, field=path, mend=mend) from None
    return understood


def _set_fields(section: msgspec.Struct, parent: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the fields that are set, each with its path."""
    for known in msgspec.structs.fields(section):
        value = getattr(section, known.name)
        path = api.below(parent, known.encode_name)
        if known.required or value is None or value in (known.default, [], {}):
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
