"""Settings in the words of a KubeProxyConfiguration, where the meaning is the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from userspace_proxy.config.settings import Settings

_GROUP, _VERSION = "kubeproxy.config.k8s.io", "v1alpha1"


def go_duration(seconds: float) -> str:
    """Return *seconds* as Go writes a duration: ``24h0m0s``, ``1m30s``, ``50ms``, ``0s``."""
    if 0 < seconds < 1:
        return f"{seconds * 1000:g}ms"
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    text = f"{rest:g}s"
    if hours or minutes:
        text = f"{minutes}m{text}"
    return f"{hours}h{text}" if hours else text


# Field -> what it is called in Settings, and how its value is written. What is None there is not told.
_FIELDS: Mapping[str, tuple[str, Callable[[Any], object]]] = {
    "clientConnection.kubeconfig": ("kubeconfig", str),
    "hostnameOverride": ("hostname_override", str),
    "healthzBindAddress": ("healthz_bind_address", str),
    "metricsBindAddress": ("metrics_bind_address", str),
    "portRange": ("proxy_port_range", lambda ports: "-".join(map(str, ports))),
    "udpIdleTimeout": ("udp_timeout_s", go_duration),
    "clusterCIDR": ("cluster_cidrs", lambda networks: ",".join(map(str, networks))),
    "detectLocalMode": ("detect_local_mode", str),
    "detectLocal.bridgeInterface": ("pod_bridge_interface", str),
    "detectLocal.interfaceNamePrefix": ("pod_interface_name_prefix", str),
    "nodePortAddresses": ("nodeport_addresses", lambda addresses: list(map(str, addresses))),
    "conntrack.maxPerCore": ("conntrack_max_per_core", int),
    "conntrack.min": ("conntrack_min", int),
    "conntrack.tcpEstablishedTimeout": ("conntrack_tcp_timeout_established_s", go_duration),
    "conntrack.tcpCloseWaitTimeout": ("conntrack_tcp_timeout_close_wait_s", go_duration),
    "conntrack.tcpBeLiberal": ("conntrack_tcp_be_liberal", bool),
    "conntrack.udpTimeout": ("conntrack_udp_timeout_s", go_duration),
    "conntrack.udpStreamTimeout": ("conntrack_udp_timeout_stream_s", go_duration),
    # Where kube-proxy reads those of every mode that it does not know.
    "iptables.syncPeriod": ("sync_period_s", go_duration),
    "iptables.minSyncPeriod": ("min_sync_period_s", go_duration),
    "logging.format": ("log_format", str),
    "logging.verbosity": ("verbose", lambda verbose: 4 if verbose else 0),
}

# The same where the mode is one of these.
_FIELDS_OF_MODES: Mapping[str, tuple[tuple[str, ...], str, Callable[[Any], object]]] = {
    "iptables.masqueradeAll": (("iptables", "ipvs"), "masquerade_all", bool),
    "iptables.masqueradeBit": (("iptables",), "masquerade_bit", int),
    "iptables.localhostNodePorts": (("iptables",), "localhost_nodeports", bool),
    "nftables.masqueradeAll": (("nftables",), "masquerade_all", bool),
    "ipvs.scheduler": (("ipvs",), "ipvs_scheduler", str),
    "ipvs.strictARP": (("ipvs",), "ipvs_strict_arp", bool),
}
TOLD = frozenset({"mode", *_FIELDS, *_FIELDS_OF_MODES})


def configz(settings: Settings) -> Mapping[str, object]:
    """Return what /configz answers: the settings in force."""
    config: dict[str, Any] = {
        "kind": "KubeProxyConfiguration",
        "apiVersion": f"{_GROUP}/{_VERSION}",
        "mode": settings.proxy_mode,
    }
    told = {path: (name, w) for path, (modes, name, w) in _FIELDS_OF_MODES.items() if settings.proxy_mode in modes}
    for path, (name, written) in {**_FIELDS, **told}.items():
        value = getattr(settings, name)
        if value is not None:
            *sections, field = path.split(".")
            section = config
            for part in sections:
                section = section.setdefault(part, {})
            section[field] = written(value)
    return {_GROUP: config}
