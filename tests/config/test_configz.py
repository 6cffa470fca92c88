"""Settings as fields of a KubeProxyConfiguration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from userspace_proxy.config.configz import configz
from userspace_proxy.config.kubeproxy_config import read_configuration
from userspace_proxy.config.settings import MODE_NAMES, Settings, fields_in
from userspace_proxy.config.values import go_duration, networks, node_port_addresses


def test_configz_has_kube_proxys_names_of_settings() -> None:
    told = configz(Settings(sync_period_s=90.0, metrics_bind_address="127.0.0.1:1", proxy_port_range=(100, 200)))

    config = told["kubeproxy.config.k8s.io"]
    assert isinstance(config, dict)
    assert (config["kind"], config["mode"]) == ("KubeProxyConfiguration", "userspace")
    assert config["iptables"] == {"syncPeriod": "1m30s", "minSyncPeriod": "50ms"}
    assert (config["metricsBindAddress"], config["portRange"]) == ("127.0.0.1:1", "100-200")
    assert not {"udpIdleTimeout", "clientConnection"} & config.keys(), "what is not set is not told"


def test_of_a_mode_its_own_fields_are_told() -> None:
    told = configz(Settings(proxy_mode="ipvs", ipvs_scheduler="lc", masquerade_all=True))["kubeproxy.config.k8s.io"]

    assert isinstance(told, dict)
    periods = {"syncPeriod": "30s", "minSyncPeriod": "50ms"}
    assert (told["mode"], told["ipvs"]) == ("ipvs", {"scheduler": "lc", "strictARP": False, **periods})
    assert told["iptables"] == {"masqueradeAll": True}
    assert "nftables" not in told


@pytest.mark.parametrize("mode", MODE_NAMES)
def test_configz_read_as_a_configuration_gives_the_same_settings(tmp_path: Path, mode: str) -> None:
    set_of_modes: dict[str, Any] = {
        "masquerade_all": True,
        "masquerade_bit": 3,
        "localhost_nodeports": False,
        "ipvs_scheduler": "lc",
        "ipvs_strict_arp": True,
    }
    counted = {name for name, _ in fields_in(mode).values()}
    settings = Settings(
        proxy_mode=mode,
        **{name: value for name, value in set_of_modes.items() if name in counted},
        kubeconfig=Path("/etc/kube/config"),
        hostname_override="node-1",
        proxy_port_range=(100, 200),
        metrics_bind_address="127.0.0.1:1",
        healthz_bind_address="[::]:2",
        udp_timeout_s=90.0,
        cluster_cidrs=networks("10.244.0.0/16"),
        detect_local_mode="InterfaceNamePrefix",
        pod_bridge_interface="cni0",
        pod_interface_name_prefix="veth",
        nodeport_addresses=node_port_addresses(["primary", "192.0.2.0/24"]),
        conntrack_max_per_core=1,
        conntrack_min=2,
        conntrack_tcp_timeout_established_s=86_400.0,
        conntrack_tcp_timeout_close_wait_s=3_600.0,
        conntrack_tcp_be_liberal=True,
        conntrack_udp_timeout_s=3.5,
        conntrack_udp_timeout_stream_s=4.0,
        sync_period_s=90.0,
        min_sync_period_s=0.25,
        log_format="json",
        verbose=True,
    )
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(configz(settings)["kubeproxy.config.k8s.io"]))

    read = read_configuration(file)

    assert (Settings(**read.settings), read.named) == (settings, [])
    assert set(read.settings) == counted, "give each new field a value in the Settings above"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.05, "50ms"), (1, "1s"), (1.5, "1.5s"), (90, "1m30s"), (3_600, "1h0m0s"), (86_400, "24h0m0s")],
)
def test_durations_are_written_as_go_writes_them(seconds: float, text: str) -> None:
    assert go_duration(seconds) == text
