"""This node with a real API server: its Node object, /healthz, and traffic before the Node exists (S7, Z)."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.control_plane import NODE_NAME, NODES, ApiError, ControlPlane
from tests.cluster.node_proxy import NodeProxy, make_service, make_slice
from tests.net.world import POD1, wait_until
from userspace_proxy.lab import ServiceLab

pytestmark = pytest.mark.cluster

WEB = {"app": "web"}
ROLES = "/apis/rbac.authorization.k8s.io/v1/clusterroles"
BINDINGS = "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings"


@pytest.fixture
def proxy(world: ServiceLab, plane: ControlPlane, tmp_path: Path) -> Iterator[NodeProxy]:
    plane.run_pod("pod1", POD1, labels=WEB)
    one = NodeProxy(world, tmp_path, plane)
    yield one
    assert one.process is not None
    assert one.stop() == 0, one.log()
    world.node.run(*one.command("cleanup"))
    plane.delete_all()


@pytest.fixture
def node(plane: ControlPlane) -> Iterator[None]:
    plane.create(NODES, NODE_NAME)
    yield
    with contextlib.suppress(ApiError):  # 404: with its last finalizer it is gone
        plane.patch(NODES, NODE_NAME, {"metadata": {"finalizers": None}})
        plane.delete(NODES, NODE_NAME)


@pytest.mark.usefixtures("node")
def test_nothing_is_served_before_services_and_slices_were_listed(proxy: NodeProxy, plane: ControlPlane) -> None:
    """S7: a role that lacks the slices is not enough; once it has them, all is well without a restart."""
    ip = make_service(plane, "web", selector=WEB)
    rules = [{"apiGroups": [""], "resources": ["services", "nodes"], "verbs": ["get", "list", "watch"]}]
    plane.create(ROLES, "half", rules=rules)
    subject = {"kind": "User", "name": "half", "apiGroup": "rbac.authorization.k8s.io"}
    role = {"kind": "ClusterRole", "name": "half", "apiGroup": "rbac.authorization.k8s.io"}
    plane.create(BINDINGS, "half", roleRef=role, subjects=[subject])
    try:
        proxy.config = plane.kubeconfig("half", "half-token")
        proxy.start(wait=False)
        wait_until(lambda: "endpointslices cannot be followed" in proxy.log(), "slices are forbidden")
        assert "403" in proxy.log()
        assert ip not in proxy.rules_text()
        assert proxy.health()[0] == 503
        assert proxy.health("/livez")[0] == 200

        rules.append({"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]})
        plane.patch(ROLES, "half", {"rules": rules})
        proxy.wait_ready(30.0)
        proxy.reaches(ip, "pod1")
        wait_until(lambda: proxy.health()[0] == 200, "it is healthy")
    finally:
        plane.delete(BINDINGS, "half")
        plane.delete(ROLES, "half")


@pytest.mark.usefixtures("node")
def test_a_node_that_is_to_go_is_left(proxy: NodeProxy, plane: ControlPlane) -> None:
    """Z2, Z3, Z4."""
    proxy.start()
    status, body = proxy.health()
    assert (status, body["nodeEligible"], body["healthy"]) == (200, True, True)
    assert {"lastUpdated", "currentTime"} <= body.keys()
    assert "nodeEligible" not in proxy.health("/livez")[1]

    taint = {"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}
    plane.patch(NODES, NODE_NAME, {"spec": {"taints": [taint]}})
    wait_until(lambda: proxy.health()[0] == 503, "the taint is heeded")
    assert proxy.health("/livez")[0] == 200
    plane.patch(NODES, NODE_NAME, {"spec": {"taints": [{"key": "other", "effect": "NoSchedule"}]}})
    wait_until(lambda: proxy.health()[0] == 200, "another taint is none of ours")

    plane.patch(NODES, NODE_NAME, {"metadata": {"finalizers": ["lab/waits"]}})
    plane.delete(NODES, NODE_NAME)
    wait_until(lambda: proxy.health()[0] == 503, "a node that is being deleted is left")
    assert proxy.health()[1]["nodeEligible"] is False
    assert proxy.health("/livez")[0] == 200


def test_a_node_that_does_not_exist_is_waited_for_and_no_longer(proxy: NodeProxy, plane: ControlPlane) -> None:
    """Z6: traffic is served nevertheless; Z2: /healthz fails until the Node exists."""
    ip = make_service(plane, "web")
    make_slice(plane, "web", "web", POD1)  # controllers leave out pods of nodes that do not exist
    proxy.start()
    proxy.reaches(ip, "pod1")
    assert proxy.health()[0] == 503
    assert proxy.health()[1]["nodeEligible"] is False
    plane.create(NODES, NODE_NAME)
    try:
        wait_until(lambda: proxy.health()[0] == 200, "the node is there")
    finally:
        plane.delete(NODES, NODE_NAME)
    # The last that was known of it stays.
    proxy.reaches(ip, "pod1")
    assert proxy.health("/livez")[0] == 200


@pytest.mark.usefixtures("node")
def test_the_ports_are_kube_proxys(proxy: NodeProxy) -> None:
    """Z5."""
    proxy.start()
    assert proxy.get("/proxyMode", 10249) == (200, "userspace")
    assert proxy.get("/healthz", 10249)[1].strip() == "ok"
    assert proxy.get("/metrics", 10249)[0] == 200
    assert json.loads(proxy.get("/healthz", 10256)[1])["lastUpdated"]


@pytest.mark.usefixtures("node")
def test_a_real_change_is_timed_from_the_controllers_annotation(proxy: NodeProxy, plane: ControlPlane) -> None:
    ip = make_service(plane, "web", selector=WEB)
    proxy.start()
    proxy.reaches(ip, "pod1")
    name = "kubeproxy_network_programming_duration_seconds_count"
    before = proxy.metric(name)
    time.sleep(1.1)  # a pod's times are whole seconds, and what was before our start is not counted
    plane.set_ready("pod1", ready=False)
    proxy.reaches(ip)
    wait_until(lambda: proxy.metric(name) > before, "the change was timed")
