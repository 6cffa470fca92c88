"""The objects that count, from a real API server and its endpoint controllers (behaviours 1: S1 to S9)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.control_plane import CORE, ENDPOINTS, NODE_NAME, NODES, PODS, SERVICES, SLICES, ControlPlane
from tests.cluster.node_proxy import HTTP, NodeProxy, make_service, make_slice
from tests.net.world import POD1, POD2, UDP_PORT, answers, ask_udp, wait_until
from userspace_proxy.lab import HTTP_PORT, ServiceLab

pytestmark = pytest.mark.cluster

WEB = {"app": "web"}
POD3 = ServiceLab.pod_ip(2)
PROXY_NAME = "service.kubernetes.io/service-proxy-name"
HEADLESS = "service.kubernetes.io/headless"


@pytest.fixture(scope="module")
def running(world: ServiceLab, plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProxy]:
    plane.create(NODES, NODE_NAME)
    one = NodeProxy(world, tmp_path_factory.mktemp("proxy"), plane)
    one.start()
    yield one
    assert one.stop() == 0, one.log()
    plane.delete(NODES, NODE_NAME)


@pytest.fixture
def proxy(running: NodeProxy, plane: ControlPlane) -> Iterator[NodeProxy]:
    yield running
    plane.delete_all()
    wait_until(lambda: '"default/' not in running.rules_text().replace("default/kubernetes", ""), "all is gone")


# ---- what controllers make of pods


def test_pods_that_a_service_selects_are_reached_as_they_come_and_go(proxy: NodeProxy, plane: ControlPlane) -> None:
    ip = make_service(plane, "web", selector=WEB)
    proxy.reaches(ip)
    plane.run_pod("pod1", POD1, labels=WEB)
    proxy.reaches(ip, "pod1")
    plane.run_pod("pod2", POD2, labels=WEB, ready=False)
    plane.run_pod("pod3", POD3, labels=WEB)
    proxy.reaches(ip, "pod1", "pod3")
    plane.set_ready("pod2", ready=True)
    proxy.reaches(ip, "pod1", "pod2", "pod3")
    plane.delete(PODS, "pod1")
    proxy.reaches(ip, "pod2", "pod3")
    plane.set_ready("pod3", ready=False)
    proxy.reaches(ip, "pod2")


def test_the_last_pods_serve_until_they_have_ended(proxy: NodeProxy, plane: ControlPlane) -> None:
    ip = make_service(plane, "web", selector=WEB)
    plane.run_pod("pod1", POD1, labels=WEB)
    plane.run_pod("pod2", POD2, labels=WEB)
    proxy.reaches(ip, "pod1", "pod2")
    for name in ("pod1", "pod2"):
        plane.ask("DELETE", f"{PODS}/{name}", {"gracePeriodSeconds": 600})
    wait_until(
        lambda: '"terminating": true' in str(plane.ask("GET", SLICES)).replace("'", '"').replace("True", "true"),
        "the controllers say that they terminate",
        10.0,
    )
    proxy.reaches(ip, "pod1", "pod2")
    plane.delete(PODS, "pod1")
    proxy.reaches(ip, "pod2")
    plane.delete(PODS, "pod2")
    proxy.reaches(ip)


def test_endpoints_written_by_hand_are_mirrored_and_reached(proxy: NodeProxy, plane: ControlPlane) -> None:
    ip = make_service(plane, "web")
    subset = {"addresses": [{"ip": POD1}], "ports": [{"name": "http", "port": HTTP_PORT}]}
    plane.create(ENDPOINTS, "web", subsets=[subset])
    proxy.reaches(ip, "pod1")
    plane.patch(ENDPOINTS, "web", {"subsets": [{**subset, "addresses": [{"ip": POD2}]}]})
    proxy.reaches(ip, "pod2")


def test_pods_that_publish_themselves_before_they_are_ready_are_reached(proxy: NodeProxy, plane: ControlPlane) -> None:
    ip = make_service(plane, "web", selector=WEB, publishNotReadyAddresses=True)
    plane.run_pod("pod1", POD1, labels=WEB, ready=False)
    proxy.reaches(ip, "pod1")
    plane.patch(SERVICES, "web", {"spec": {"publishNotReadyAddresses": False}})
    proxy.reaches(ip)


def test_named_target_ports_differ_from_pod_to_pod(proxy: NodeProxy, plane: ControlPlane) -> None:
    ip = make_service(plane, "web", ports=[{"name": "web", "port": 80, "targetPort": "http"}], selector=WEB)
    plane.run_pod("pod1", POD1, labels=WEB)
    proxy.reaches(ip, "pod1")


def test_a_service_made_again_is_another_one(proxy: NodeProxy, plane: ControlPlane) -> None:
    plane.run_pod("pod1", POD1, labels=WEB)
    first = make_service(plane, "web", selector=WEB)
    proxy.reaches(first, "pod1")
    plane.delete(SERVICES, "web")
    proxy.leaves(first)
    second = make_service(plane, "web", selector=WEB)
    proxy.reaches(second, "pod1")


# ---- S1, S2, S8: Services


def test_headless_services_and_names_of_elsewhere_are_not_served(proxy: NodeProxy, plane: ControlPlane) -> None:
    """S1."""
    plane.run_pod("pod1", POD1, labels=WEB)
    make_service(plane, "headless", selector=WEB, clusterIP="None")
    make_service(plane, "elsewhere", ports=[], type="ExternalName", externalName="example.org")
    ip = make_service(plane, "web", selector=WEB)
    proxy.reaches(ip, "pod1")
    assert '"default/headless' not in proxy.rules_text()
    assert '"default/elsewhere' not in proxy.rules_text()


@pytest.mark.parametrize("value", ["another", ""])
def test_a_service_that_names_a_proxy_is_left_to_it_from_then_on(
    proxy: NodeProxy, plane: ControlPlane, value: str
) -> None:
    """S2: any value, the empty one as well."""
    plane.run_pod("pod1", POD1, labels=WEB)
    ip = make_service(plane, "web", selector=WEB)
    proxy.reaches(ip, "pod1")
    plane.patch(SERVICES, "web", {"metadata": {"labels": {PROXY_NAME: value}}})
    proxy.leaves(ip)
    plane.patch(SERVICES, "web", {"metadata": {"labels": {PROXY_NAME: None}}})
    proxy.reaches(ip, "pod1")


def test_a_services_type_changes_in_place_and_its_node_port_is_free_at_once(
    proxy: NodeProxy, plane: ControlPlane
) -> None:
    """S8."""
    make_service(plane, "web", type="ExternalName", externalName="example.org", selector=WEB)
    made = plane.patch(SERVICES, "web", {"spec": {"type": "ClusterIP", "externalName": None}})
    ip = made["spec"]["clusterIP"]
    # Older controllers leave the headless label on slices that they made while there was no address.
    plane.run_pod("pod1", POD1, labels=WEB)
    proxy.reaches(ip, "pod1")

    made = plane.patch(SERVICES, "web", {"spec": {"type": "NodePort"}})
    node_port = made["spec"]["ports"][0]["nodePort"]
    proxy.reaches("192.168.50.1", "pod1", port=node_port)
    proxy.reaches(ip, "pod1")

    made = plane.patch(SERVICES, "web", {"spec": {"type": "LoadBalancer"}})
    assert made["spec"]["ports"][0]["nodePort"] == node_port
    proxy.reaches("192.168.50.1", "pod1", port=node_port)

    plane.patch(SERVICES, "web", {"spec": {"type": "ClusterIP", "ports": [{**HTTP[0], "nodePort": None}]}})
    proxy.reaches("192.168.50.1", port=node_port)
    proxy.reaches(ip, "pod1")
    other = make_service(plane, "other", ports=[{**HTTP[0], "nodePort": node_port}], selector=WEB, type="NodePort")
    proxy.reaches("192.168.50.1", "pod1", port=node_port)
    proxy.reaches(other, "pod1")

    plane.patch(SERVICES, "web", {"spec": {"type": "ExternalName", "externalName": "example.org", "clusterIP": ""}})
    proxy.leaves(ip)


def test_a_services_ports_come_and_go(proxy: NodeProxy, plane: ControlPlane) -> None:
    plane.run_pod("pod1", POD1, labels=WEB)
    ip = make_service(plane, "web", selector=WEB)
    proxy.reaches(ip, "pod1")
    more = {"name": "more", "port": 81, "targetPort": HTTP_PORT}
    plane.patch(SERVICES, "web", {"spec": {"ports": [*HTTP, more]}})
    proxy.reaches(ip, "pod1", port=81)
    plane.patch(SERVICES, "web", {"spec": {"ports": [more]}})
    wait_until(lambda: not answers(proxy.world.client, ip, 80), "the first port is gone")
    proxy.reaches(ip, "pod1", port=81)


# ---- S3, S4, S9: EndpointSlices


def test_a_slice_that_is_labelled_headless_counts_no_more(proxy: NodeProxy, plane: ControlPlane) -> None:
    """S3."""
    ip = make_service(plane, "web")
    make_slice(plane, "a", "web", POD1)
    make_slice(plane, "b", "web", POD2)
    proxy.reaches(ip, "pod1", "pod2")
    plane.patch(SLICES, "a", {"metadata": {"labels": {HEADLESS: ""}}})
    proxy.reaches(ip, "pod2")
    plane.patch(SLICES, "a", {"metadata": {"labels": {HEADLESS: None}}})
    proxy.reaches(ip, "pod1", "pod2")


def test_a_slice_belongs_to_the_service_of_its_label_and_namespace(proxy: NodeProxy, plane: ControlPlane) -> None:
    """S4."""
    ip = make_service(plane, "web")
    make_slice(plane, "nobody", None, POD1)
    make_slice(plane, "names", "web", "example.org", kind="FQDN")
    with_other = SLICES.replace("/default/", "/kube-public/")
    plane.ask(
        "POST",
        with_other,
        {
            "metadata": {"name": "other", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4",
            "endpoints": [{"addresses": [POD1]}],
            "ports": [{"name": "http", "port": HTTP_PORT}],
        },
    )
    make_slice(plane, "own", "web", POD2)
    try:
        proxy.reaches(ip, "pod2")
        plane.patch(SLICES, "own", {"metadata": {"labels": {"kubernetes.io/service-name": "another"}}})
        proxy.reaches(ip)
        plane.patch(SLICES, "nobody", {"metadata": {"labels": {"kubernetes.io/service-name": "web"}}})
        proxy.reaches(ip, "pod1")
    finally:
        plane.ask("DELETE", f"{with_other}/other")


def test_slices_of_a_service_are_one_set(proxy: NodeProxy, plane: ControlPlane) -> None:
    """S9."""
    ip = make_service(plane, "web")
    make_slice(plane, "a", "web", POD1, POD2)
    make_slice(plane, "b", "web", POD2, POD3)
    proxy.reaches(ip, "pod1", "pod2", "pod3")
    assert proxy.metric("userspace_proxy_endpoints", service="web") == 3
    plane.delete(SLICES, "a")
    proxy.reaches(ip, "pod2", "pod3")
    plane.delete(SLICES, "b")
    proxy.reaches(ip)


# ---- S5, S6


def test_a_service_of_both_families_is_reached_by_both(proxy: NodeProxy, plane: ControlPlane) -> None:
    """S5."""
    made = plane.create(
        SERVICES,
        "web",
        spec={"ports": list(HTTP), "selector": WEB, "ipFamilyPolicy": "RequireDualStack"},
    )
    four, six = made["spec"]["clusterIPs"]
    plane.run_pod("pod1", POD1, ServiceLab.pod_ip6(0), labels=WEB)
    proxy.reaches(four, "pod1")
    proxy.reaches(six, "pod1")
    plane.patch(
        SERVICES, "web", {"spec": {"ipFamilyPolicy": "SingleStack", "clusterIPs": [four], "ipFamilies": ["IPv4"]}}
    )
    proxy.leaves(six)
    proxy.reaches(four, "pod1")


def test_one_port_number_serves_tcp_and_udp_apart(proxy: NodeProxy, plane: ControlPlane) -> None:
    """S6; ports of a slice differ by name and protocol."""
    client = proxy.world.client
    ports = [
        {"name": "tcp", "port": 80, "targetPort": HTTP_PORT},
        {"name": "udp", "port": 80, "targetPort": UDP_PORT, "protocol": "UDP"},
    ]
    plane.run_pod("pod1", POD1, labels=WEB)
    ip = make_service(plane, "web", ports=ports, selector=WEB)
    proxy.reaches(ip, "pod1")
    wait_until(lambda: ask_udp(client, ip, 80, 0.5) == "pod1", "UDP is answered")
    plane.patch(SERVICES, "web", {"spec": {"ports": ports[1:]}})
    wait_until(lambda: not answers(client, ip, 80), "TCP is gone")
    assert ask_udp(client, ip, 80) == "pod1"


def test_session_affinity_is_switched_on_and_off(proxy: NodeProxy, plane: ControlPlane) -> None:
    for index, pod in enumerate(("pod1", "pod2", "pod3")):
        plane.run_pod(pod, ServiceLab.pod_ip(index), labels=WEB)
    ip = make_service(plane, "web", selector=WEB)
    proxy.reaches(ip, "pod1", "pod2", "pod3")
    plane.patch(SERVICES, "web", {"spec": {"sessionAffinity": "ClientIP"}})
    client = proxy.world.client
    wait_until(lambda: len({answers(client, ip, 80) for _ in range(15)}) == 1, "one pod has this client")
    plane.patch(SERVICES, "web", {"spec": {"sessionAffinity": "None", "sessionAffinityConfig": None}})
    proxy.reaches(ip, "pod1", "pod2", "pod3")


def test_the_api_servers_own_service_is_reached_by_its_cluster_ip(proxy: NodeProxy, plane: ControlPlane) -> None:
    """`kubernetes`: a Service without a selector whose slice the API server writes itself."""
    ip = plane.ask("GET", f"{CORE}/services/kubernetes")["spec"]["clusterIP"]
    wait_until(lambda: ip in proxy.rules_text(), "it is served")
