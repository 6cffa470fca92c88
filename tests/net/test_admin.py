"""Answers of the whole process at kube-proxy's ports, while it serves real traffic."""

from __future__ import annotations

import json
import socket

from tests.admin.scrape import exposed
from tests.net.world import POD1, POD2, Proxy, ask_udp, wait_until
from userspace_proxy.lab import ServiceLab, ask, connect

IP = "10.96.12.1"


def of_endpoint(proxy: Proxy, name: str, pod: str, port: str = "8080") -> float:
    return proxy.metric(f"userspace_proxy_endpoint_{name}", service="told", endpoint=f"{pod}:{port}")


def test_endpoint_counters_are_shown_until_the_endpoint_is_removed(proxy: Proxy, world: ServiceLab) -> None:
    proxy.serve("told", IP, POD1, POD2)
    for _ in range(4):
        ask(world.client, IP)
    ask_udp(world.client, IP)

    assert [of_endpoint(proxy, "connections_total", pod) for pod in (POD1, POD2)] == [2, 2]
    assert of_endpoint(proxy, "to_clients_bytes_total", POD1) > 0
    assert [of_endpoint(proxy, "udp_flows_total", pod, "5353") for pod in (POD1, POD2)] == [1, 0]

    with held(world, proxy) as sock:
        proxy.serve("told", IP, POD1)
        assert of_endpoint(proxy, "open_connections", POD2) == 1
        sock.close()
        wait_until(lambda: f'endpoint="{POD2}:8080"' not in proxy.get("/metrics", 10249)[1], "its series are gone")
    assert of_endpoint(proxy, "connections_total", POD1) >= 2


def held(world: ServiceLab, proxy: Proxy) -> socket.socket:
    """Return a connection to POD2 that stays open."""
    while True:
        sock = connect(world.client, IP, 80)
        wait_until(lambda: proxy.metric("userspace_proxy_endpoint_open_connections", service="told") == 1, "it is open")
        if of_endpoint(proxy, "open_connections", POD2):
            return sock
        sock.close()
        wait_until(lambda: proxy.metric("userspace_proxy_endpoint_open_connections", service="told") == 0, "it is not")


def test_a_scrape_is_whole_and_the_other_paths_are_kube_proxys(proxy: Proxy) -> None:
    proxy.serve("told", IP, POD1)

    metrics = {metric.name for metric in exposed(proxy.get("/metrics", 10249)[1], whole=False)}
    assert {"userspace_proxy_endpoint_connections_total", "kubeproxy_sync_proxy_rules_service_changes_total"} <= metrics
    assert proxy.get("/healthz", 10249) == (200, "ok")
    config = json.loads(proxy.get("/configz", 10249)[1])["kubeproxy.config.k8s.io"]
    assert (config["mode"], config["iptables"]["syncPeriod"]) == ("userspace", "30s")
    assert "kubernetes_healthcheck" in proxy.get("/metrics/slis", 10249)[1]
    health = json.loads(proxy.get("/healthz", 10256)[1])
    assert all(health["status"][family]["healthy"] for family in ("IPv4", "IPv6"))
    wait_until(lambda: not proxy.metric("kubeproxy_sync_proxy_rules_endpoint_changes_pending"), "all is brought")
