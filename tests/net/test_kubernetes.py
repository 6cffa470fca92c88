"""The whole process as the node proxy of a cluster: an API server on the node, and real packets."""

from __future__ import annotations

import json
import re
import signal
import socket
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.apiserver import NODES, SERVICE_CIDRS, SERVICES, SLICES, ApiServerThread
from tests.net.world import POD1, POD2, Proxy, answers, background_requests, is_refused, told, udp_socket, wait_until
from tests.sources.test_kubernetes import PROXY_NAME, hold_certificates, kubeconfig, serving_tls
from userspace_proxy.lab import HTTP_PORT, ServiceLab, ask
from userspace_proxy.lab.hosts import CLIENT_IP

IP = "10.96.9.1"


class Cluster:
    """A cluster with an API server on the lab's node, and its proxy there."""

    def __init__(self, world: ServiceLab, folder: Path, tls: ssl.SSLContext | None = None) -> None:
        with world.node.inside():
            sock = socket.create_server(("127.0.0.1", 0))
        self.world = world
        self.api = ApiServerThread(sock, tls)
        self.config = kubeconfig(folder, self.api.server.url)
        self.proxy = ClusterProxy(world, folder, self.config)
        self.put(NODES, {"metadata": {"name": "node-1"}, "spec": {}})

    def put(self, path: str, given: dict[str, Any]) -> None:
        self.api.do(self.api.server.put(path, given))

    def serve(self, name: str, cluster_ip: str, *pods: str, labels: dict[str, str] | None = None) -> None:
        metadata = {"name": name, "namespace": "default"}
        self.put(
            SERVICES,
            {
                "metadata": {**metadata, "labels": labels},
                "spec": {"clusterIP": cluster_ip, "clusterIPs": [cluster_ip], "ports": [{"port": 80}]},
            },
        )
        self.put(
            SLICES,
            {
                "metadata": {**metadata, "labels": {"kubernetes.io/service-name": name}},
                "addressType": "IPv4",
                "endpoints": [{"addresses": [pod]} for pod in pods] or None,
                "ports": [{"name": "", "port": HTTP_PORT, "protocol": "TCP"}],
            },
        )

    def restart_api(self) -> None:
        """Start the API server again at its old address, on the node."""
        host, port = self.api.server.url.removeprefix("http://").split(":")
        with self.world.node.inside():
            sock = socket.create_server((host, int(port)))
        self.api.do(self.api.server.start(sock))

    def answers(self, ip: str = IP) -> set[str]:
        return {answers(self.world.client, ip, 80) for _ in range(4)}


class ClusterProxy(Proxy):
    def __init__(self, world: ServiceLab, folder: Path, config: Path) -> None:
        super().__init__(world, folder)
        self.config = config

    def run_arguments(self) -> list[str]:
        return [
            *("run", "--kubeconfig", str(self.config), "--hostname-override", "node-1", "--rules", "nftables"),
            *("--state-dir", str(self.folder / "state"), "--verbose"),
        ]

    def health(self, path: str = "/healthz") -> tuple[int, Any]:
        status, body = self.get(path, 10256)
        return status, json.loads(body)


@pytest.fixture
def cluster(world: ServiceLab, tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(world, tmp_path)
    yield made
    proxy = made.proxy
    if proxy.process is not None and proxy.process.poll() is None:
        assert proxy.stop() == 0, proxy.log()
    proxy.end()
    made.api.close()


def test_clients_reach_the_endpoints_of_the_api(cluster: Cluster, world: ServiceLab) -> None:
    cluster.serve("web", IP, POD1)
    cluster.proxy.start()
    assert cluster.answers() == {"pod1"}

    cluster.serve("web", IP, POD2)
    wait_until(lambda: cluster.answers() == {"pod2"}, "traffic goes to the new endpoint")
    cluster.serve("web", IP)
    wait_until(lambda: is_refused(world.client, IP, 80), "nobody is there any more")
    cluster.serve("web", IP, POD1, POD2)
    wait_until(lambda: cluster.answers() == {"pod1", "pod2"}, "both are reached")

    assert cluster.proxy.health()[1]["nodeEligible"] is True
    assert cluster.proxy.metric("userspace_proxy_watch_last_heard_age_seconds", kind="services") < 5
    assert cluster.proxy.stop() == 0


def test_unused_addresses_of_the_service_cidrs_are_dropped(cluster: Cluster, world: ServiceLab) -> None:
    """It left the node by its default route otherwise."""
    cluster.serve("web", IP, POD1)
    cluster.proxy.start("--proxy-mode", "nftables")
    cluster.put(SERVICE_CIDRS, {"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/16"]}})
    rule = "ip daddr 10.96.0.0/16 fib daddr type != local drop"
    wait_until(lambda: rule in cluster.proxy.rules_text(), "the rule is there")
    wait_until(
        lambda: "blackhole 10.96.0.0/16" in world.node.ip("route", "show", "table", "10778"), "nor is it forwarded"
    )
    assert cluster.answers() == {"pod1"}
    world.node.ip("route", "add", "default", "via", CLIENT_IP)
    try:
        with pytest.raises(PermissionError), udp_socket(world.node, "10.96.9.77", 53) as sock:
            sock.send(b"who")  # EPERM: a rule at OUTPUT drops it
    finally:
        world.node.ip("route", "del", "default")

    cluster.api.do(cluster.api.server.delete(SERVICE_CIDRS, "kubernetes", ""))
    wait_until(lambda: rule not in cluster.proxy.rules_text(), "the rule is gone")


def test_no_request_fails_while_the_api_is_gone_and_nothing_is_stale_when_it_is_back(
    cluster: Cluster, world: ServiceLab
) -> None:
    cluster.serve("web", IP, POD1)
    cluster.serve("old", "10.96.9.2", POD1)
    cluster.proxy.start()
    server = cluster.api.server

    with background_requests(lambda: ask(world.client, IP)) as outcomes:
        cluster.api.do(server.stop())
        wait_until(lambda: len(cluster.proxy.health()[1].get("problems", [])) == 3, "the outage is a problem")
        seen = len(outcomes)
        wait_until(lambda: len(outcomes) > seen + 20, "requests go on")
        cluster.serve("web", IP, POD1, POD2)
        cluster.api.do(server.delete(SERVICES, "old"))
        server.compact()
        cluster.restart_api()
        wait_until(lambda: "pod2" in outcomes[-4:], "the new endpoint is used")
        wait_until(lambda: not cluster.proxy.health()[1].get("problems"), "all is well again")

    assert set(outcomes) == {"pod1", "pod2"}
    assert '"default/old:' not in cluster.proxy.rules_text()
    assert cluster.proxy.metric("userspace_proxy_watch_expired_total", kind="services") == 1
    assert cluster.proxy.metric("userspace_proxy_watch_relists_total", kind="services") == 2


def test_a_long_api_outage_is_reported_and_fails_healthz_only_by_a_flag(cluster: Cluster, world: ServiceLab) -> None:
    cluster.serve("web", IP, POD1)
    cluster.proxy.start("--degraded-after", "300ms")
    assert cluster.proxy.metric("userspace_proxy_degraded") == 0
    cluster.api.do(cluster.api.server.stop())
    wait_until(lambda: len(cluster.proxy.health()[1].get("degraded", [])) == 3, "it says that it is degraded")

    status, body = cluster.proxy.health()
    assert (status, body["healthy"]) == (200, True)
    assert any("services cannot be followed since" in said for said in body["degraded"])
    assert cluster.proxy.metric("userspace_proxy_degraded") == 1
    assert cluster.answers() == {"pod1"}

    # Another one of the same cluster takes over, and is told to mind; it has to be let in by the API first.
    cluster.restart_api()
    first = cluster.proxy.process
    assert first is not None
    cluster.proxy.start("--degraded-after", "300ms", "--degraded-status", "503")
    assert first.wait(20) == 0
    cluster.api.do(cluster.api.server.stop())
    wait_until(lambda: cluster.proxy.health()[0] == 503, "load balancers are told to leave")
    assert cluster.proxy.health("/livez")[0] == 200
    assert cluster.answers() == {"pod1"}


def test_a_node_marked_for_deletion_fails_healthz_but_not_livez(cluster: Cluster) -> None:
    cluster.proxy.start()
    taint = {"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}
    cluster.put(NODES, {"metadata": {"name": "node-1"}, "spec": {"taints": [taint]}})
    wait_until(lambda: cluster.proxy.health()[0] == 503, "the taint is heeded")

    assert cluster.proxy.health()[1]["nodeEligible"] is False
    status, body = cluster.proxy.health("/livez")
    assert status == 200
    assert "nodeEligible" not in body
    cluster.put(NODES, {"metadata": {"name": "node-1"}, "spec": {"taints": None}})
    wait_until(lambda: cluster.proxy.health()[0] == 200, "it may stay")


def test_a_named_proxy_serves_exactly_what_names_it(cluster: Cluster) -> None:
    cluster.serve("web", IP, POD1, labels={PROXY_NAME: "userspace-proxy"})
    cluster.serve("kube", "10.96.9.2", POD1)
    cluster.proxy.start("--service-proxy-name", "userspace-proxy")

    assert cluster.answers() == {"pod1"}
    assert "10.96.9.2" not in cluster.proxy.rules_text()
    cluster.serve("web", IP, POD1)
    wait_until(lambda: IP not in cluster.proxy.rules_text(), "it is left to others")


class PodProxy(ClusterProxy):
    """A proxy in a pod, whose service account is in a folder of the test."""

    def __init__(self, cluster: Cluster, certificates: Path, folder: Path) -> None:
        super().__init__(cluster.world, folder, cluster.config)
        (folder / "token").write_text("of the pod")
        host, port = cluster.api.server.url.removeprefix("https://").split(":")
        self._program = (
            "import os; from kubernetes_asyncio.config import incluster_config as pod\n"
            f"pod.SERVICE_TOKEN_FILENAME = {str(folder / 'token')!r}\n"
            f"pod.SERVICE_CERT_FILENAME = {str(certificates / 'ca.crt')!r}\n"
            f"os.environ |= {{'KUBERNETES_SERVICE_HOST': {host!r}, 'KUBERNETES_SERVICE_PORT': {port!r}}}\n"
            "from userspace_proxy.cli import main; main()\n"
        )

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-c", self._program, *arguments]

    def run_arguments(self) -> list[str]:
        return ["run", "--in-cluster", *super().run_arguments()[3:]]


def test_a_pod_that_has_handed_over_waits_until_it_is_deleted(
    world: ServiceLab, tmp_path: Path, certificates: Path
) -> None:
    """A kubelet would restart the old one, and it would take over again, until both pods are deleted."""
    cluster = Cluster(world, tmp_path, serving_tls(certificates))
    cluster.serve("web", IP, POD1)
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    old, new = (PodProxy(cluster, certificates, tmp_path / name) for name in ("old", "new"))
    try:
        old.start()
        new.start()
        wait_until(lambda: not old.workers(), "the old one has no worker any more")
        assert old.process is not None
        assert old.process.poll() is None
        assert cluster.answers() == {"pod1"}

        assert old.stop() == 0
        assert cluster.answers() == {"pod1"}
        assert new.stop() == 0
    finally:
        if old.process is not None and old.process.poll() is None:
            old.process.kill()
            old.process.wait(20)
        new.end()
        cluster.api.close()


def test_livez_stays_healthy_while_the_proxy_waits_for_the_api(cluster: Cluster) -> None:
    cluster.api.server.forbidden.add(SLICES)
    cluster.proxy.start(wait=False)
    # Not "403" alone, which may be in the port of the server, and that is logged before anything listens for probes.
    wait_until(lambda: re.search("cannot be followed.* 403", cluster.proxy.log()), "the API refuses")

    assert cluster.proxy.health("/healthz")[0] == 503
    assert cluster.proxy.health("/livez")[0] == 200


def test_exactly_one_source_must_be_given(cluster: Cluster, world: ServiceLab) -> None:
    proxy = cluster.proxy
    for arguments in ([], ["--in-cluster", "--kubeconfig", "x"], ["x.yaml", "--in-cluster"]):
        done = world.node.run(*proxy.command("run", *arguments), check=False)
        assert done.returncode == 2
        assert "give one of PATH..., --kubeconfig FILE and --in-cluster" in done.stderr
    assert told(world.node, proxy, "run", "--kubeconfig", "/nothing") == (
        "userspace-proxy: --kubeconfig /nothing: no such file"
    )


class ConfiguredProxy(ClusterProxy):
    def run_arguments(self) -> list[str]:
        return ["run", "--config", str(self.folder / "config.yaml"), "--state-dir", str(self.folder / "state")]


def test_it_runs_as_a_kube_proxy_configuration_says(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "apiVersion: kubeproxy.config.k8s.io/v1alpha1\n"
        "kind: KubeProxyConfiguration\n"
        f"clientConnection: {{kubeconfig: {cluster.config}}}\n"
        "hostnameOverride: node-1\n"
        "portRange: 20000-20009\n"
        "iptables: {minSyncPeriod: 100ms}\n"
        "ipvs: {scheduler: lc}\n"
        "conntrack: {tcpEstablishedTimeout: 2h0m0s}\n"
    )
    cluster.serve("web", IP, POD1)
    cluster.proxy = ConfiguredProxy(cluster.world, tmp_path, cluster.config)
    cluster.proxy.start()

    assert cluster.answers() == {"pod1"}
    assert 20_000 <= cluster.proxy.proxy_port("default/web") <= 20_009
    assert cluster.proxy.health()[1]["nodeEligible"] is True
    cluster.proxy.wait_logged("nothing done about it: ipvs.scheduler")
    file = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established"
    assert int(cluster.world.node.run("cat", file).stdout) == 7_200


def test_the_node_has_events_for_the_start_and_for_refused_limits(cluster: Cluster, world: ServiceLab) -> None:
    room = int(world.node.run("cat", "/proc/sys/net/netfilter/nf_conntrack_max").stdout)
    cluster.serve("web", IP, POD1)
    # In a namespace of its own the kernel lets nobody make more room.
    cluster.proxy.start("--conntrack-min", str(room + 1))

    def told() -> dict[str, Any]:
        return {event["reason"]: event for event in cluster.api.server.events}

    wait_until(lambda: {"Starting", "FailedToSetConntrack"} <= told().keys(), "both are told")
    assert told()["Starting"]["regarding"]["name"] == "node-1"
    assert f"nf_conntrack_max is {room} and cannot be made" in told()["FailedToSetConntrack"]["note"]
    seconds = world.node.run("cat", "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established")
    assert int(seconds.stdout) == 86_400, "as kube-proxy sets it"
    assert cluster.answers() == {"pod1"}


def test_a_service_that_cannot_be_served_as_written_is_reported_and_served_in_part(cluster: Cluster) -> None:
    metadata = {"name": "web", "namespace": "default", "annotations": {"userspace-proxy/source-ip": "mine"}}
    cluster.serve("web", IP, POD1)
    cluster.put(
        SERVICES, {"metadata": metadata, "spec": {"clusterIP": IP, "clusterIPs": [IP], "ports": [{"port": 80}]}}
    )
    cluster.proxy.start()

    def notes() -> list[str]:
        found = [event for event in cluster.api.server.events if event["regarding"]["kind"] == "Service"]
        return [f"{event['regarding']['name']} {event['reason']}: {event['note']}" for event in found]

    wait_until(notes, "an Event of the Service")
    (note,) = notes()
    assert note.startswith("web NotServedAsWritten: ")
    assert "'mine' says no source IP" in note
    assert cluster.proxy.metric("userspace_proxy_object_problems") == 1
    assert cluster.answers() == {"pod1"}
    assert cluster.proxy.stop() == 0


def test_of_two_services_with_one_external_ip_the_newer_one_gets_the_warning(
    cluster: Cluster, world: ServiceLab
) -> None:
    for name, ip, pod, created in (
        ("a-newer", "10.96.7.8", POD2, "2026-02-01"),
        ("older", "10.96.7.9", POD1, "2026-01-01"),
    ):
        cluster.serve(name, ip, pod)
        spec = {"clusterIP": ip, "clusterIPs": [ip], "externalIPs": ["203.0.113.8"], "ports": [{"port": 80}]}
        metadata = {"name": name, "namespace": "default", "creationTimestamp": f"{created}T00:00:00Z"}
        cluster.put(SERVICES, {"metadata": metadata, "spec": spec})
    cluster.proxy.start()

    def told() -> list[dict[str, Any]]:
        return [event for event in cluster.api.server.events if event["regarding"]["kind"] == "Service"]

    wait_until(told, "an Event of the Service")
    said = "203.0.113.8:80 is served for default/older, and not for this Service"
    assert [(event["regarding"]["name"], said in event["note"]) for event in told()] == [("a-newer", True)]
    assert cluster.proxy.log().count(said) == 1
    assert said in str(cluster.proxy.health()[1]["problems"])
    assert cluster.answers("203.0.113.8") == {"pod1"}
    assert cluster.answers("10.96.7.8") == {"pod2"}


def test_a_start_anew_leaves_no_certificate_behind(
    world: ServiceLab, tmp_path: Path, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library writes them to files and removes these when Python exits; exec is no exit."""
    (held := tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(held))
    cluster = Cluster(world, tmp_path, serving_tls(certificates))
    hold_certificates(cluster.config, certificates)
    cluster.serve("web", IP, POD1)
    proxy = cluster.proxy
    try:
        proxy.start()
        assert proxy.process is not None
        before = set(held.iterdir())
        proxy.process.send_signal(signal.SIGUSR2)
        wait_until(lambda: "taken over from another process" in proxy.log(), "it has started anew")
        wait_until(lambda: cluster.answers() == {"pod1"}, "it serves")

        assert not before & set(held.iterdir())
        assert proxy.stop() == 0
        assert list(held.iterdir()) == []
    finally:
        proxy.end()
        cluster.api.close()
