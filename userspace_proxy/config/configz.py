"""Settings in the words of a KubeProxyConfiguration, where the meaning is the same."""

from collections.abc import Mapping
from typing import Any

from userspace_proxy.config.settings import Settings, fields_in

_GROUP, _VERSION = "kubeproxy.config.k8s.io", "v1alpha1"


def configz(settings: Settings) -> Mapping[str, object]:
    """Return what /configz answers: the settings in force."""
    config: dict[str, Any] = {
        "kind": "KubeProxyConfiguration",
        "apiVersion": f"{_GROUP}/{_VERSION}",
        "mode": settings.proxy_mode,
    }
    for path, (name, kind) in fields_in(settings.proxy_mode).items():
        value = getattr(settings, name)
        if value is not None:
            *sections, field = path.split(".")
            section = config
            for part in sections:
                section = section.setdefault(part, {})
            section[field] = kind.encode(value)
    return {_GROUP: config}
