"""Reading a KubeProxyConfiguration: honoured fields, reported fields, errors, and flags over it."""

from __future__ import annotations

import ipaddress
import json
import os
import threading
from pathlib import Path
from typing import Any

import click
import pytest

from tools.flags import with_fields
from userspace_proxy.cli.run import run, settings_from
from userspace_proxy.config.kubeproxy_config import Configuration, read_configuration
from userspace_proxy.config.settings import SETTINGS, Settings
from userspace_proxy.errors import StartError

HEAD = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n"

# As kubeadm 1.34 writes it into the ConfigMap kube-proxy.
KUBEADM = """\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection:
  acceptContentTypes: ""
  burst: 0
  contentType: ""
  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf
  qps: 0
clusterCIDR: 10.244.0.0/16
configSyncPeriod: 0s
conntrack:
  maxPerCore: null
  min: null
  tcpBeLiberal: false
  tcpCloseWaitTimeout: null
  tcpEstablishedTimeout: null
  udpStreamTimeout: 0s
  udpTimeout: 0s
detectLocal:
  bridgeInterface: ""
  interfaceNamePrefix: ""
detectLocalMode: ""
enableProfiling: false
healthzBindAddress: ""
hostnameOverride: ""
iptables:
  localhostNodePorts: null
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
ipvs:
  excludeCIDRs: null
  minSyncPeriod: 0s
  scheduler: ""
  strictARP: false
  syncPeriod: 0s
  tcpFinTimeout: 0s
  tcpTimeout: 0s
  udpTimeout: 0s
kind: KubeProxyConfiguration
logging:
  flushFrequency: 0
  options:
    json:
      infoBufferSize: "0"
    text:
      infoBufferSize: "0"
  verbosity: 0
metricsBindAddress: ""
mode: ""
nftables:
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
nodePortAddresses: null
oomScoreAdj: null
portRange: ""
showHiddenMetricsForVersion: ""
winkernel:
  enableDSR: false
  forwardHealthCheckVip: false
  networkName: ""
  rootHnsEndpointName: ""
  sourceVip: ""
"""


def read(tmp_path: Path, text: str) -> Configuration:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return read_configuration(file)


def settings(*arguments: str) -> Settings:
    """Return the settings of `run` with these arguments."""
    options: dict[str, Any] = run.make_context("run", list(arguments)).params
    return settings_from(options.pop("configuration"), options)


def test_what_kubeadm_writes_is_read_and_leaves_every_default(tmp_path: Path) -> None:
    told = read(tmp_path, KUBEADM)

    assert told.named == []
    assert told.settings == {
        "kubeconfig": Path("/var/lib/kube-proxy/kubeconfig.conf"),
        "cluster_cidrs": (ipaddress.ip_network("10.244.0.0/16"),),
    }


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("hostnameOverride: node-7", {"hostname_override": "node-7"}),
        ("healthzBindAddress: 127.0.0.1:1234", {"healthz_bind_address": "127.0.0.1:1234"}),
        ("healthzBindAddress: '::'", {"healthz_bind_address": "[::]:10256"}),
        ("metricsBindAddress: 0.0.0.0", {"metrics_bind_address": "0.0.0.0:10249"}),
        (
            "bindAddress: '::'",
            {"healthz_bind_address": "[::]:10256", "metrics_bind_address": "[::1]:10249"},
        ),
        (
            "clusterCIDR: 10.0.0.0/8,fd00::/8",
            {"cluster_cidrs": (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8"))},
        ),
        ("detectLocalMode: NodeCIDR", {"detect_local_mode": "NodeCIDR"}),
        ("detectLocal: {bridgeInterface: cbr0}", {"pod_bridge_interface": "cbr0"}),
        ("detectLocal: {interfaceNamePrefix: cali}", {"pod_interface_name_prefix": "cali"}),
        (
            "nodePortAddresses: [192.0.2.0/24, primary]",
            {"nodeport_addresses": (ipaddress.ip_network("192.0.2.0/24"), "primary")},
        ),
        (
            "nodePortAddresses: [localhost]",
            {"nodeport_addresses": (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))},
        ),
        ("iptables: {syncPeriod: 1h0m0s, minSyncPeriod: 1s500ms}", {"sync_period_s": 3600, "min_sync_period_s": 1.5}),
        ("mode: userspace\niptables: {syncPeriod: 5s}", {"sync_period_s": 5}),
        (
            "mode: iptables\niptables: {masqueradeAll: true, masqueradeBit: 3, localhostNodePorts: false}",
            {"proxy_mode": "iptables", "masquerade_all": True, "masquerade_bit": 3, "localhost_nodeports": False},
        ),
        ("conntrack: {maxPerCore: 0, min: 5}", {"conntrack_max_per_core": 0, "conntrack_min": 5}),
        (
            "conntrack: {tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 30m}",
            {"conntrack_tcp_timeout_established_s": 0, "conntrack_tcp_timeout_close_wait_s": 1800},
        ),
        (
            "conntrack: {tcpBeLiberal: true, udpTimeout: 20s, udpStreamTimeout: 1m}",
            {
                "conntrack_tcp_be_liberal": True,
                "conntrack_udp_timeout_s": 20,
                "conntrack_udp_timeout_stream_s": 60,
            },
        ),
        ("logging: {format: json, verbosity: 2}", {"log_format": "json", "verbose": False}),
        ("logging: {verbosity: 4}", {"verbose": True}),
        ("portRange: 20000-20999", {"proxy_port_range": (20_000, 20_999)}),
        ("portRange: 20000+999", {"proxy_port_range": (20_000, 20_999)}),
        ("portRange: 0-0", {}),
        ("udpIdleTimeout: 250ms", {"udp_timeout_s": 0.25}),
        (
            "mode: ipvs\nipvs: {scheduler: lc, syncPeriod: 20s, strictARP: true}\niptables: {masqueradeAll: true}",
            {
                "proxy_mode": "ipvs",
                "ipvs_scheduler": "lc",
                "ipvs_strict_arp": True,
                "sync_period_s": 20,
                "masquerade_all": True,
            },
        ),
    ],
)
def test_a_field_of_the_same_meaning_is_honoured(tmp_path: Path, written: str, meant: dict[str, Any]) -> None:
    told = read(tmp_path, HEAD + written)

    assert told.settings == meant
    assert told.named == []
    assert Settings(**told.settings)


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ("mode: kernelspace", "mode: 'kernelspace'"),
        ("bindAddress: 192.0.2.1", "bindAddress: '192.0.2.1'"),
        ("iptables: {masqueradeAll: true}", "iptables.masqueradeAll"),
        ("iptables: {masqueradeBit: 0}", "iptables.masqueradeBit"),
        ("iptables: {localhostNodePorts: false}", "iptables.localhostNodePorts"),
        ("ipvs: {scheduler: lc}", "ipvs.scheduler: 'lc'"),
        ("ipvs: {syncPeriod: 30s}", "ipvs.syncPeriod"),
        ("clientConnection: {qps: 50}", "clientConnection.qps"),
        ("featureGates: {TopologyAwareHints: true}", "featureGates"),
        ("logging: {flushFrequency: 5s}", "logging.flushFrequency: '5s'"),
        ("logging: {options: {json: {splitStream: true}}}", "logging.options"),
        ("oomScoreAdj: -999", "oomScoreAdj"),
        ("showHiddenMetricsForVersion: '1.35'", "showHiddenMetricsForVersion: '1.35'"),
        ("winkernel: {enableDSR: true}", "winkernel.enableDSR"),
    ],
)
def test_a_field_without_a_meaning_here_is_named(tmp_path: Path, written: str, named: str) -> None:
    told = read(tmp_path, HEAD + written)

    assert told.named == [named]
    assert told.settings == {}


def test_the_page_names_every_field_that_is_honoured() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "configuration.md").read_text()

    assert page == with_fields(page), "make reference"
    for setting in SETTINGS.values():
        assert all(f"| `{path}` |" in page for path in setting.fields)


def test_the_mode_and_its_section_count(tmp_path: Path) -> None:
    told = read(
        tmp_path, HEAD + "mode: nftables\nnftables: {syncPeriod: 7s, masqueradeAll: true}\niptables: {syncPeriod: 9s}"
    )

    assert told.settings == {"proxy_mode": "nftables", "sync_period_s": 7, "masquerade_all": True}
    assert told.named == ["iptables.syncPeriod"]


@pytest.mark.parametrize(
    ("written", "line", "said"),
    [
        ("clusterCidr: 10.0.0.0/8", 3, "clusterCidr: 'clusterCidr' is not known; did you mean clusterCIDR?"),
        ("conntrack:\n  maxPerCor: 1", 4, "conntrack.maxPerCor: 'maxPerCor' is not known; did you mean maxPerCore?"),
        ("conntrack:\n  min: many", 4, "conntrack.min: must be a number, not text; write it in digits"),
        ("conntrack:\n  min: -1", 4, "conntrack.min: -1 is not in the range; write 0 or more"),
        ("iptables:\n  syncPeriod: 30", 4, "iptables.syncPeriod: must be a duration, not 30; write such as 30s"),
        ("iptables:\n  syncPeriod: -5s", 4, "iptables.syncPeriod: '-5s' is no duration"),
        ("iptables:\n  syncPeriod: 5 s", 4, "iptables.syncPeriod: '5 s' is no duration"),
        ("iptables: []", 3, "iptables: must be a mapping, not a list"),
        ("clusterCIDR: 10.0.0.0/8,11.0.0.0/8", 3, "clusterCIDR: one range for each IP family at most"),
        ("nodePortAddresses:\n- 10.0.0.1/8", 3, "nodePortAddresses: 10.0.0.1/8 has host bits set; write a range"),
        ("detectLocalMode: Bridge", 3, "detectLocalMode: 'Bridge' is not known; write one of ClusterCIDR, NodeCIDR"),
        ("bindAddress: here", 3, "bindAddress: 'here' does not appear to be an IPv4 or IPv6 address"),
        ("logging: {format: xml}", 3, "logging.format: 'xml' is not known; write one of text, json"),
        ("mode: iptables\niptables: {masqueradeBit: 32}", 4, "iptables.masqueradeBit: 32 is not in the range"),
        ("mode: a\nmode: b", 4, "stands twice"),
        ("\tmode: a", 3, "a tab is used for indentation"),
    ],
)
def test_a_fault_is_named_with_line_field_and_fix(tmp_path: Path, written: str, line: int, said: str) -> None:
    with pytest.raises(StartError) as refused:
        read(tmp_path, HEAD + written)

    assert f"config.yaml:{line}: " in str(refused.value)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it must hold one document, not 0"),
        (f"{HEAD}---\n{HEAD}", "it must hold one document, not 2"),
        ("- 1", "this is no KubeProxyConfiguration; begin with 'kind: KubeProxyConfiguration'"),
        ("kind: Service", "'Service' is no KubeProxyConfiguration"),
        ("kind: KubeProxyConfiguration\napiVersion: v1", "write kubeproxy.config.k8s.io/v1alpha1"),
    ],
)
def test_what_is_no_kube_proxy_configuration_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(StartError, match=said):
        read(tmp_path, text)


@pytest.mark.parametrize("text", ["- " * 30_000, "[" * 30_000, "a: &a {<<: [*a]}", HEAD + "verbosity: !!bool x\n"])
def test_a_configuration_over_a_bound_is_refused_with_its_line(tmp_path: Path, text: str) -> None:
    (file := tmp_path / "config").write_text(text)

    with pytest.raises(StartError, match=rf"{file}:\d: "):
        read_configuration(file)


def test_a_configuration_may_be_a_pipe_and_no_device(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    writer = threading.Thread(target=pipe.write_text, args=[HEAD + "clusterCIDR: 10.0.0.0/8\n"])
    writer.start()
    read = read_configuration(pipe)
    writer.join()

    assert "cluster_cidrs" in read.settings
    with pytest.raises(StartError, match="not a regular file"):
        read_configuration(Path("/dev/zero"))


def test_a_configuration_may_be_json(tmp_path: Path) -> None:
    plain = {"apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration", "mode": "userspace"}

    assert read(tmp_path, json.dumps({**plain, "hostnameOverride": "n"})).settings == {"hostname_override": "n"}


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"{HEAD}hostnameOverride: of-the-file\nclientConnection: {{kubeconfig: /of/the/file}}\n")

    told = settings("--config", str(file), "--hostname-override", "of-the-flag")

    assert (told.hostname_override, told.kubeconfig) == ("of-the-flag", Path("/of/the/file"))
    assert settings("--config", str(file)).hostname_override == "of-the-file"
    assert settings("--config", str(file)).sync_period_s == Settings().sync_period_s


@pytest.mark.parametrize("chosen", [["services.yaml"], ["--kubeconfig", "/mine"], ["--in-cluster"]])
def test_a_source_on_the_command_line_is_the_source(tmp_path: Path, chosen: list[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"{HEAD}clientConnection: {{kubeconfig: /of/the/file}}\n")

    told = settings("--config", str(file), *chosen)

    assert told.paths == tuple(chosen if chosen == ["services.yaml"] else ())
    assert told.kubeconfig == (Path("/mine") if "/mine" in chosen else None)
    assert told.in_cluster == (chosen == ["--in-cluster"])


def test_a_file_without_a_kubeconfig_means_the_cluster_whose_pod_this_is(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(HEAD)

    assert settings("--config", str(file)).in_cluster


def test_a_missing_file_is_refused_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        settings("--config", str(tmp_path / "none.yaml"))

    assert ended.value.code == 1
    assert "none.yaml: No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--detect-local-mode", "BridgeInterface"], "needs --pod-bridge-interface"),
        (["--detect-local-mode", "InterfaceNamePrefix"], "needs --pod-interface-name-prefix"),
        (["--min-sync-period", "10s", "--sync-period", "5s"], "must not be longer"),
        (["--pod-bridge-interface", "much-too-long-a-name"], "is no interface"),
        (["--cluster-cidr", "10.0.0.0"], None),
        (["--cluster-cidr", "10.0.0.0/40"], "write a range such as"),
        (["--cluster-cidr", "fd00::%eth0/64"], "has a zone"),
        (["--pod-bridge-interface", 'cni0"'], "is no interface"),
        (["--nodeport-addresses", "primary,everything"], "'everything' does not appear to be"),
        (["--conntrack-min", "-1"], "not in the range"),
        (["--sync-period", "soon"], "is no duration"),
    ],
)
def test_flags_are_checked(arguments: list[str], said: str | None) -> None:
    if said is None:
        assert settings("services.yaml", *arguments)
        return
    with pytest.raises(click.UsageError, match=said):
        settings("services.yaml", *arguments)


def test_addresses_without_a_port_have_kube_proxys() -> None:
    told = settings("services.yaml", "--healthz-bind-address", "[::]", "--metrics-bind-address", "0.0.0.0")

    assert (told.healthz_bind_address, told.metrics_bind_address) == ("[::]:10256", "0.0.0.0:10249")


def test_files_may_have_a_node_name() -> None:
    assert settings("services.yaml", "--hostname-override", "Node-1 ").node_name == "node-1"


def test_flags_of_kube_proxy_have_its_values() -> None:
    told = settings(
        "services.yaml",
        *("--detect-local-mode", "InterfaceNamePrefix", "--pod-interface-name-prefix", "cali"),
        *("--nodeport-addresses", "192.0.2.0/24,primary", "--conntrack-tcp-timeout-established", "1h0m0s"),
    )

    assert told.pod_interface_name_prefix == "cali"
    assert told.nodeport_addresses == (ipaddress.ip_network("192.0.2.0/24"), "primary")
    assert told.conntrack_tcp_timeout_established_s == 3600
