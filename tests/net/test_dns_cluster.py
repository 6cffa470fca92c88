"""Cluster DNS as the addon of a cluster: names of what an API server has."""

from __future__ import annotations

import dns.rcode
import pytest

from tests.apiserver import SERVICES, SLICES
from tests.net.test_dns import ARGUMENTS, CLUSTER, asked, found
from tests.net.test_kubernetes import Cluster, cluster
from tests.net.world import wait_until
from tests.sources.test_kubernetes import PROXY_NAME

__all__ = ["cluster"]
NAME = f"db.default{CLUSTER}"


def put_headless(cluster: Cluster, *endpoints: tuple[str, str, bool], publishes_all: bool = False) -> None:
    """Bring the headless Service db with *endpoints*: hostname, address, and whether it is ready."""
    metadata = {"name": "db", "namespace": "default"}
    spec = {"clusterIP": "None", "clusterIPs": ["None"], "ports": [{"name": "sql", "port": 5432}]}
    cluster.put(SERVICES, {"metadata": metadata, "spec": {**spec, "publishNotReadyAddresses": publishes_all}})
    cluster.put(
        SLICES,
        {
            "metadata": {
                **metadata,
                "labels": {"kubernetes.io/service-name": "db", "service.kubernetes.io/headless": ""},
            },
            "addressType": "IPv4",
            "endpoints": [
                {"hostname": hostname, "addresses": [ip], "conditions": {"ready": ready}}
                for hostname, ip, ready in endpoints
            ],
            "ports": [{"name": "sql", "port": 5432, "protocol": "TCP"}],
        },
    )


@pytest.mark.parametrize("served", ["ours", "theirs"])
def test_services_have_names_whichever_proxy_serves_them(cluster: Cluster, served: str) -> None:
    ips = {"ours": "10.96.0.21", "theirs": "10.96.0.22"}
    for name, ip in ips.items():
        labels = {PROXY_NAME: name} if name == "theirs" else {}
        metadata = {"name": name, "namespace": "default", "labels": labels}
        cluster.put(SERVICES, {"metadata": metadata, "spec": {"clusterIP": ip, "ports": [{"port": 80}]}})
    cluster.proxy.start(*ARGUMENTS, *(("--service-proxy-name", served) if served == "theirs" else ()))

    for name, ip in ips.items():
        assert found(asked(cluster.world.node, f"{name}.default{CLUSTER}")) == [ip]
        assert (ip in cluster.proxy.rules_text()) is (name == served)


def test_a_headless_service_of_the_api_has_the_names_of_its_endpoints(cluster: Cluster) -> None:
    node = cluster.world.node
    put_headless(cluster, ("db-0", "10.244.0.1", True), ("db-1", "10.244.0.2", False))
    cluster.proxy.start(*ARGUMENTS)
    assert found(asked(node, NAME)) == ["10.244.0.1"]
    assert found(asked(node, f"_sql._tcp.{NAME}", "SRV")) == [f"0 100 5432 db-0.{NAME}"]
    assert asked(node, f"db-1.{NAME}").rcode() == dns.rcode.NXDOMAIN

    put_headless(cluster, ("db-0", "10.244.0.1", True), ("db-1", "10.244.0.2", True))
    wait_until(lambda: found(asked(node, NAME)) == ["10.244.0.1", "10.244.0.2"], "the other one is ready, too")
    assert found(asked(node, f"db-1.{NAME}")) == ["10.244.0.2"]

    put_headless(cluster, ("db-0", "10.244.0.1", False), publishes_all=True)
    wait_until(lambda: found(asked(node, NAME)) == ["10.244.0.1"], "one that is not ready is published")

    cluster.api.do(cluster.api.server.delete(SERVICES, "db", "default"))
    wait_until(lambda: asked(node, NAME).rcode() == dns.rcode.NXDOMAIN, "the name is gone")
