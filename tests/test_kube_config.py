"""Settings in a KubeProxyConfiguration's words."""

from __future__ import annotations

import pytest

from userspace_proxy.kube_config import configz, go_duration
from userspace_proxy.settings import Settings


def test_the_settings_in_force_are_told_by_the_names_that_kube_proxy_has_for_them() -> None:
    told = configz(Settings(sync_period_s=90.0, metrics_bind_address="127.0.0.1:1", proxy_port_range=(100, 200)))

    config = told["kubeproxy.config.k8s.io"]
    assert isinstance(config, dict)
    assert (config["kind"], config["mode"]) == ("KubeProxyConfiguration", "userspace")
    assert config["iptables"] == {"syncPeriod": "1m30s", "minSyncPeriod": "50ms"}
    assert (config["metricsBindAddress"], config["portRange"]) == ("127.0.0.1:1", "100-200")
    assert not {"udpIdleTimeout", "clientConnection"} & config.keys(), "what is not set is not told"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.05, "50ms"), (1, "1s"), (1.5, "1.5s"), (90, "1m30s"), (3_600, "1h0m0s"), (86_400, "24h0m0s")],
)
def test_durations_are_written_as_go_writes_them(seconds: float, text: str) -> None:
    assert go_duration(seconds) == text
