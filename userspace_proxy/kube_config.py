"""Settings in the words of a KubeProxyConfiguration, where the meaning is the same."""

from __future__ import annotations

from collections.abc import Mapping

from userspace_proxy.settings import Settings

GROUP = "kubeproxy.config.k8s.io"
VERSION = "v1alpha1"


def configz(settings: Settings) -> Mapping[str, object]:
    """Return what /configz answers: the settings in force."""
    return {GROUP: _as_kube_config(settings)}


def _as_kube_config(settings: Settings) -> dict[str, object]:
    return {
        "kind": "KubeProxyConfiguration",
        "apiVersion": f"{GROUP}/{VERSION}",
        "mode": "userspace",
        "clientConnection": {"kubeconfig": str(settings.kubeconfig or "")},
        "hostnameOverride": settings.hostname_override,
        "healthzBindAddress": settings.healthz_bind_address,
        "metricsBindAddress": settings.metrics_bind_address,
        "portRange": "-".join(map(str, settings.proxy_port_range)),
        "minSyncPeriod": go_duration(settings.min_sync_period_s),
        "syncPeriod": go_duration(settings.sync_period_s),
        "conntrack": {
            "tcpEstablishedTimeout": go_duration(settings.idle_timeout_s),
            "tcpCloseWaitTimeout": go_duration(settings.half_closed_timeout_s),
            "udpTimeout": None if settings.udp_timeout_s is None else go_duration(settings.udp_timeout_s),
        },
    }


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
