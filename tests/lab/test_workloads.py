"""What manifests ask the lab to simulate."""

from __future__ import annotations

from userspace_proxy.lab.workloads import Port, declared, read
from userspace_proxy.model.names import NamespacedName

DEPLOYMENT = """\
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: web, image: nginx}]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports: [{port: 80, targetPort: 9376}, {name: dns, port: 53, protocol: UDP}]
"""


def test_what_the_proxy_reads_has_no_workloads_and_keeps_its_line_numbers() -> None:
    _, rest, _ = read("web.yaml", DEPLOYMENT)

    assert "Deployment" not in rest
    assert rest.splitlines().index("kind: Service") == DEPLOYMENT.splitlines().index("kind: Service")


def test_a_list_keeps_what_is_no_pod() -> None:
    _, rest, _ = read("list.yaml", '{"kind": "List", "items": [{"kind": "Pod", "metadata": {"name": "a"}}, '
                   '{"kind": "Service", "metadata": {"name": "b"}}]}')  # fmt: skip

    assert '"Service"' in rest
    assert '"Pod"' not in rest


def test_pods_of_a_deployment_have_its_labels_and_a_name_made_of_its_revision() -> None:
    found = declared(read("web.yaml", DEPLOYMENT)[0])
    web = found.workloads[NamespacedName("default", "web")]

    first, again, restarted = web.pod(web.revision(0), 0), web.pod(web.revision(0), 0), web.pod(web.revision(1), 0)

    assert first == again
    assert first["metadata"]["labels"] == {"app": "web"}
    assert first["metadata"]["name"].startswith(f"web-{web.revision(0)}-")
    assert restarted["metadata"]["name"] != first["metadata"]["name"]


def test_pods_of_a_stateful_set_are_numbered_and_have_a_name_in_its_service() -> None:
    text = DEPLOYMENT.replace("Deployment", "StatefulSet").replace("replicas: 2", "serviceName: web")
    web = declared(read("web.yaml", text)[0]).workloads[NamespacedName("default", "web")]

    pod = web.pod(web.revision(0), 1)

    assert pod["metadata"]["name"] == pod["spec"]["hostname"] == "web-1"
    assert pod["spec"]["subdomain"] == "web"


def test_a_pod_answers_at_the_ports_that_it_declares_or_else_at_those_that_services_ask_for() -> None:
    found = declared(read("web.yaml", DEPLOYMENT)[0])
    silent = found.workloads[NamespacedName("default", "web")].pod("r", 0)
    silent["metadata"]["namespace"] = "default"
    declaring = {**silent, "spec": {"containers": [{"ports": [{"containerPort": 8080}]}]}}

    assert found.ports(silent) == {Port(9376, "TCP"), Port(53, "UDP")}
    assert found.ports(declaring) == {Port(8080, "TCP")}


def test_endpoints_written_by_hand_are_addresses_to_simulate_if_they_are_private() -> None:
    text = """\
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: a}
addressType: IPv4
ports: [{port: 8080}]
endpoints: [{addresses: [10.1.2.3]}, {addresses: [8.8.8.8]}]
"""
    assert declared(read("a.yaml", text)[0]).addresses == {"10.1.2.3": {Port(8080, "TCP")}}
