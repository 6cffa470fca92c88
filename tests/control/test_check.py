"""`userspace-proxy check`: faults and notes, their lines, and how to repair them."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from userspace_proxy.cli import commands

TUTORIAL = """\
apiVersion: v1
kind: Service
metadata:
  name: my-nginx
  labels:
    run: my-nginx
spec:
  ports:
  - port: 80
    protocol: TCP
  selector:
    run: my-nginx
---
apiVersion: apps/v1
kind: Deployment
metadata:
  name: my-nginx
spec:
  selector:
    matchLabels:
      run: my-nginx
  replicas: 2
  template:
    metadata:
      labels:
        run: my-nginx
    spec:
      containers:
      - name: my-nginx
        image: nginx
        ports:
        - containerPort: 80
          name: web
"""

POD = """\
---
apiVersion: v1
kind: Pod
metadata:
  name: web-1
  labels:
    app: web
spec:
  containers:
  - name: web
    ports:
    - name: http
      containerPort: 8080
    - name: dns
      containerPort: 53
      protocol: UDP
status:
  podIP: 10.244.0.5
"""

GOOD = (
    """\
apiVersion: v1
kind: Service
metadata:
  name: web
spec:
  type: NodePort
  clusterIP: 10.96.0.10
  selector:
    app: web
  ports:
  - name: http
    port: 80
    targetPort: http
    nodePort: 30080
  - name: dns
    port: 53
    targetPort: dns
    protocol: UDP
"""
    + POD
    + """\
---
apiVersion: v1
kind: Service
metadata: {name: db}
spec:
  ports: [{port: 5432}]
---
apiVersion: v1
kind: Endpoints
metadata: {name: db}
subsets:
- addresses: [{ip: 10.0.0.1}]
  ports: [{port: 5432}]
---
apiVersion: v1
kind: Service
metadata: {name: cache}
spec:
  ports: [{port: 6379, name: redis}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: cache-1, labels: {kubernetes.io/service-name: cache}}
addressType: IPv4
endpoints: [{addresses: [10.0.0.2], conditions: {ready: true}}]
ports: [{port: 6379, name: redis}]
---
apiVersion: v1
kind: Service
metadata: {name: headless}
spec: {clusterIP: None, selector: {app: nothing}}
---
apiVersion: v1
kind: Service
metadata: {name: elsewhere}
spec: {type: ExternalName, externalName: example.org}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: Web}
"""
)


CONTRACT = """\
apiVersion: v1
kind: Service
metadata:
  name: web
  labels: {app: web}
  annotations: {userspace-proxy/source-ip: node}
spec:
  externalTrafficPolicy: Local
  ports: [{port: 80, appProtocol: http, nodePort: null}]
  trafficPolicy: Local
status:
  loadBalancer: {ingress: [{hostname: lb.example.org}]}
"""


def check(*arguments: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(commands, ["check", *map(str, arguments)], input=stdin)


def findings(text: str) -> list[dict[str, Any]]:
    result = check("--json", "-", stdin=text)
    found: list[dict[str, Any]] = json.loads(result.stdout)
    assert result.exit_code == (1 if any(finding["severity"] == "fault" for finding in found) else 0)
    return found


def said(found: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(finding["line"], finding["field"]) for finding in found]


# ---- nothing wrong


def test_good_manifests_are_counted_and_that_is_all(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)

    result = check(tmp_path)

    assert result.output == "9 objects, nothing wrong\n"
    assert result.exit_code == 0


def test_kinds_that_a_proxy_does_not_read_are_fine() -> None:
    result = check("-", stdin=TUTORIAL.partition("---\n")[2])

    assert result.output == "1 object, nothing wrong\n"


def test_a_file_that_is_named_twice_is_read_once(tmp_path: Path) -> None:
    file = tmp_path / "good.yaml"
    file.write_text(GOOD)

    assert check(tmp_path, file, f"{tmp_path}/./good.yaml").output == "9 objects, nothing wrong\n"


# ---- files of other tools, and what public manifests hold

OTHERS = {
    "kustomization.yaml": "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources: [web.yaml]\n",
    "kind.yaml": "kind: Cluster\napiVersion: kind.x-k8s.io/v1alpha4\nnodes:\n- role: control-plane\n",
    "kubeadm.yaml": "apiVersion: kubeadm.k8s.io/v1beta4\nkind: ClusterConfiguration\ndns: {}\n"
    "---\napiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n",
    "kubeconfig.yaml": "apiVersion: v1\nkind: Config\nclusters: []\nusers: []\ncontexts: []\ncurrent-context: ''\n",
    "values.yaml": "replicaCount: 1\nservice: {type: ClusterIP, port: 80}\ntolerations: []\n",
    "Chart.yaml": "apiVersion: v2\nname: web\nversion: 0.1.0\nappVersion: '1.16'\n",
    "docker-compose.yml": "services:\n  web: {image: nginx, ports: ['8080:80']}\n",
    ".gitlab-ci.yml": "stages: [a]\njob: {script: !reference [.setup, script]}\n",
    "ci.yml": "name: ci\non: [push]\njobs: {test: {runs-on: ubuntu-latest, steps: [{run: make}]}}\n",
    "playbook.yml": "- hosts: all\n  tasks:\n  - name: install\n    apt: {name: nginx}\n",
    "template.yaml": "{{- if .Values.on }}\napiVersion: v1\nkind: Service\nmetadata:\n  name: {{ .Values.name }}\n"
    "{{- end }}\n",
    "template2.yaml": 'apiVersion: v1\nkind: Service\nmetadata:\n  name: {{ include "a" . }}\nspec: {}\n',
    "template3.yaml": "apiVersion: v1\nkind: Service\nmetadata: {name: '{{ name }}'}\nspec: {ports: [{port: 80}]}\n",
    "template4.yaml": "apiVersion: v1\nkind: Service\nmetadata: {name: a}\n"
    "spec: {clusterIP: None, ports: [{port: '${PORT}'}]}\n",
    "vault.yaml": "apiVersion: v1\nkind: Secret\nmetadata: {name: s}\nstringData: {password: !vault abc}\n",
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_tools_file_is_named_once_at_most_and_the_service_beside_it_is_judged(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / name.lstrip(".")).write_text(OTHERS[name])

    alone = check("--json", tmp_path)
    (tmp_path / "web.yaml").write_text(broken("clusterIP: 10.96.0.10", "clusterIP: none"))
    beside = json.loads(check("--json", tmp_path).stdout)

    assert alone.exit_code == 0, alone.output
    notes = json.loads(alone.stdout)
    assert [finding["severity"] for finding in notes] in ([], ["note"])
    assert [finding["field"] for finding in beside if finding["severity"] == "fault"] == ["spec.clusterIP"]


# As in the manifests of ingress-nginx, kube-prometheus, Longhorn, Istio, and in a dump of a cluster.
PUBLIC = """\
apiVersion: v1
kind: Service
metadata:
  name: controller
  namespace: edge
  annotations: {service.beta.kubernetes.io/aws-load-balancer-type: nlb, prometheus.io/port: 10254, a: null}
spec:
  externalTrafficPolicy: Local
  ipFamilies: [IPv4]
  ipFamilyPolicy: SingleStack
  type: LoadBalancer
  ports:
  - {appProtocol: http, name: http, port: 80, protocol: TCP, targetPort: http}
  - {appProtocol: https, name: https, port: 443, protocol: TCP, targetPort: https}
  selector: {app.kubernetes.io/component: controller, app.kubernetes.io/name: edge}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: controller, namespace: edge}
spec:
  template:
    metadata: {labels: {app.kubernetes.io/component: controller, app.kubernetes.io/name: edge}}
    spec:
      containers:
      - name: controller
        ports: [{containerPort: 80, name: http}, {containerPort: 443, name: https}, {containerPort: 84, name: hook}]
---
apiVersion: v1
kind: Service
metadata: {name: alertmanager-main, namespace: edge}
spec:
  ports: [{name: web, port: 9093, targetPort: web}, {name: reloader-web, port: 8080, targetPort: reloader-web}]
  selector: {app.kubernetes.io/component: alert-router, app.kubernetes.io/name: alertmanager}
  sessionAffinity: ClientIP
---
apiVersion: v1
kind: Service
metadata: {name: engine-manager}
spec: {clusterIP: None, selector: {component: engine}}
---
apiVersion: v1
kind: Service
metadata: {name: frontend, labels: {app: ui}}
spec:
  type: ClusterIP
  selector: {app: ui}
  loadBalancerIP: ""
  loadBalancerSourceRanges:
  ports: [{name: http, port: 80, targetPort: http, nodePort: null}]
---
apiVersion: v1
kind: Service
metadata: {name: dns}
spec:
  selector: {k8s-app: dns}
  ports: [{name: dns, port: 53, protocol: UDP}, {name: dns-tcp, port: 53, protocol: TCP}]
---
apiVersion: v1
kind: List
metadata: {resourceVersion: ""}
items:
- apiVersion: v1
  kind: Service
  metadata: {name: kubernetes, creationTimestamp: "2024-01-01T00:00:00Z", uid: a}
  spec:
    clusterIP: 10.96.0.1
    clusterIPs: [10.96.0.1]
    internalTrafficPolicy: Cluster
    ipFamilies: [IPv4]
    ipFamilyPolicy: SingleStack
    ports: [{name: https, port: 443, protocol: TCP, targetPort: 6443}]
    sessionAffinity: None
    type: ClusterIP
  status: {loadBalancer: {}}
- apiVersion: discovery.k8s.io/v1
  kind: EndpointSlice
  metadata: {name: kubernetes, labels: {kubernetes.io/service-name: kubernetes}}
  addressType: IPv4
  endpoints: [{addresses: [192.168.49.2], conditions: {ready: true}}]
  ports: [{name: https, port: 8443, protocol: TCP}]
- apiVersion: v1
  kind: Endpoints
  metadata:
    name: kube-scheduler
    namespace: kube-system
    annotations: {control-plane.alpha.kubernetes.io/leader: '{"holderIdentity":"cp-1"}'}
---
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: services.example.org}
---
apiVersion: serving.knative.dev/v1
kind: Service
metadata: {name: Hello}
spec: {template: {}}
---
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: x}
"""


def test_what_public_manifests_hold_is_no_fault_and_what_they_lack_is_a_note() -> None:
    found = findings(PUBLIC)

    assert [finding["severity"] for finding in found] == ["note"] * 4, found
    assert {finding["field"] for finding in found} == {"spec.selector"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig"])
def test_a_file_with_a_byte_order_mark_is_read(encoding: str, tmp_path: Path) -> None:
    mark = "\ufeff" if encoding.startswith("utf-16-") else ""
    (tmp_path / "web.yaml").write_bytes((mark + GOOD).replace("\n", "\r\n").encode(encoding))

    assert check(tmp_path).output == "9 objects, nothing wrong\n"


def test_of_very_many_findings_the_faults_come_first_and_the_others_are_counted() -> None:
    text = "".join(
        f"---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{index}}}\nspec: {{selector: {{a: b}}, {rest}}}\n"
        for index, rest in enumerate(["ports: [{port: 80}]"] * 2 + ["type: x, ports: [{port: 80}]"] * 1_000)
    )

    result = check("-", stdin=text)

    assert result.exit_code == 1
    rows = result.stdout.splitlines()
    assert len(rows) == 1_001
    assert all("spec.type" in row for row in rows[:-1])
    assert rows[-1] == "1002 more findings; --json lists all"


def test_notes_fail_a_check_that_is_strict_alone() -> None:
    lenient, strict = check("-", stdin=TUTORIAL), check("--strict", "-", stdin=TUTORIAL)

    assert (lenient.exit_code, strict.exit_code) == (0, 1)
    assert lenient.output.splitlines()[0].startswith("stdin:11: note: spec.selector: the selector run=my-nginx")
    assert lenient.output.splitlines()[-1] == "2 objects, nothing wrong, 1 note"


def test_a_check_has_the_ranges_of_a_run() -> None:
    text = GOOD.replace(
        "spec:\n  ports: [{port: 5432}]", "spec:\n  ipFamilies: [IPv6]\n  ports: [{port: 5432}]"
    ).replace("10.0.0.1", "'fd00::1'")
    ranges = ("--service-cluster-ip-range", "10.96.0.0/16,fd00:96::/112")

    assert check("-", stdin=text).exit_code == 1
    assert check(*ranges, "-", stdin=text).exit_code == 0


# ---- the tutorial of everybody


def test_a_tutorials_service_and_deployment_lack_only_the_pods() -> None:
    (finding,) = findings(TUTORIAL)

    assert (finding["file"], finding["line"], finding["field"]) == ("stdin", 11, "spec.selector")
    assert finding["severity"] == "note"
    assert finding["object"] == "Service default/my-nginx"
    assert "Deployment default/my-nginx" in finding["problem"]
    assert "makes no Pods" in finding["problem"]
    assert "kubectl get pods -o yaml" in finding["mend"]


def test_a_target_port_is_looked_up_in_the_template_where_there_are_no_pods() -> None:
    found = findings(TUTORIAL.replace("protocol: TCP", "targetPort: wbe"))

    assert said(found) == [(10, "spec.ports[0].targetPort"), (11, "spec.selector")]
    assert found[0]["mend"] == "did you mean 'web'?"


# ---- one mistake, one finding


def broken(old: str, new: str) -> str:
    assert GOOD.count(old) >= 1, old
    return GOOD.replace(old, new, 1)


def broken_last(old: str, new: str) -> str:
    before, found, after = GOOD.rpartition(old)
    assert found
    return before + new + after


def annotated(annotation: str) -> str:
    return broken("  name: web\nspec:", f"  name: web\n  annotations: {{{annotation}}}\nspec:")


@pytest.mark.parametrize(
    ("text", "line", "field", "problem", "fix"),
    [
        pytest.param(
            broken("  ports:\n  - name: http\n", "   ports:\n  - name: http\n"),
            *(10, "ports", "the YAML is broken", "indentation"),
            id="ports indented too far",
        ),
        pytest.param(
            broken("  ports:\n  - name: http\n", " ports:\n  - name: http\n"),
            *(10, "ports", "the YAML is broken", "indentation"),
            id="ports indented too little",
        ),
        pytest.param(
            broken("name: web\nspec:", "Name: web\n  name: web\nspec:"),
            *(4, "metadata.Name", "no field 'Name'", "did you mean 'name'?"),
            id="an upper-case field",
        ),
        pytest.param(
            broken("clusterIP: 10.96.0.10", "clusterIp: 10.96.0.10"),
            *(7, "spec.clusterIp", "no field 'clusterIp'", "did you mean 'clusterIP'?"),
            id="clusterIp",
        ),
        pytest.param(
            broken("  selector:\n", "  selectors:\n"),
            *(8, "spec.selectors", "no field 'selectors'", "did you mean 'selector'?"),
            id="selectors",
        ),
        pytest.param(
            broken("spec:\n  type", "spce:\n  type"),
            *(5, "spce", "no field 'spce'", "did you mean 'spec'?"),
            id="spce",
        ),
        pytest.param(
            broken("  selector:\n    app: web\n", "  selector:\n    app: web\n    sessionAffinity: ClientIP\n"),
            *(10, "spec.selector.sessionAffinity", "belongs under 'spec'", "move it there"),
            id="sessionAffinity under selector",
        ),
        pytest.param(
            broken("    app: web\n", "    matchLabels: {app: web}\n"),
            *(9, "spec.selector.matchLabels", "must be text, not a mapping", "right under 'selector'"),
            id="matchLabels",
        ),
        pytest.param(
            broken("    port: 80\n", "    \u00a0port: 80\n"),
            12,
            "spec.ports[0].\u00a0port",
            "non-breaking space",
            "again",
            id="pasted spaces",
        ),
        pytest.param(
            broken("  - name: http\n", "  -\n"), 12, "spec.ports[0]", "must name each", "add names", id="unnamed"
        ),
        pytest.param(
            broken("  - name: dns\n", "  - name: http\n"),
            *(15, "spec.ports[1].name", "already that of ports[0]", "a name of its own"),
            id="duplicate port name",
        ),
        pytest.param(
            broken("  - name: http\n", "  - name: HTTP\n"),
            *(11, "spec.ports[0].name", "'HTTP' is not a valid name", "such as 'http'"),
            id="upper-case port name",
        ),
        pytest.param(
            broken("  name: web\n", "  name: My_Web\n"),
            *(4, "metadata.name", "'My_Web' is not a valid name", "such as 'my-web'"),
            id="upper-case name",
        ),
        pytest.param(
            broken("  name: web-1\n", "  name: Web-1\n"),
            *(23, "metadata.name", "'Web-1' is not a valid name", "such as 'web-1'"),
            id="upper-case Pod name",
        ),
        pytest.param(
            broken("clusterIP: 10.96.0.10", "clusterIP: none"),
            *(7, "spec.clusterIP", "'none' is no IP address", "'None', with a capital N"),
            id="clusterIP: none",
        ),
        pytest.param(
            broken("port: 80\n", "port: 80000\n"),
            *(12, "spec.ports[0].port", "80000 is not a port", "1 to 65535"),
            id="port out of range",
        ),
        pytest.param(
            broken("port: 80\n", 'port: "80"\n'),
            *(12, "spec.ports[0].port", "must be a number, not text", "without quotes"),
            id="port in quotes",
        ),
        pytest.param(
            broken("targetPort: http", "targetPort: 0x11170"),
            *(13, "spec.ports[0].targetPort", "70000 is not a port", "1 to 65535"),
            id="target port out of range",
        ),
        pytest.param(
            broken("nodePort: 30080", "nodePort: 8080"),
            *(14, "spec.ports[0].nodePort", "8080 is not a number from 30000 to 32767", "30000 to 32767"),
            id="node port out of range",
        ),
        pytest.param(
            broken("  type: NodePort\n", "  type: ClusterIP\n"),
            *(14, "spec.ports[0].nodePort", "has no node ports", "type: NodePort"),
            id="node port of a ClusterIP",
        ),
        pytest.param(
            broken("  type: NodePort\n", "  type: Nodeport\n"),
            *(6, "spec.type", "'Nodeport' is no Service type", "NodePort"),
            id="type",
        ),
        pytest.param(
            broken("protocol: UDP\n", "protocol: SCTP\n"),
            *(
                18,
                "spec.ports[1].protocol",
                "'SCTP' cannot be proxied",
                "remove the port, or serve it another way; the",
            ),
            id="SCTP",
        ),
        pytest.param(
            broken("  - name: http\n    port: 80\n", "  - name: http\n    port: 80:8080\n"),
            *(12, "spec.ports[0].port", "must be a number", "write port: 80 and targetPort: 8080"),
            id="two ports in one, as Docker writes them",
        ),
        pytest.param(
            broken("targetPort: http", "targetPort: 8888"),
            13,
            "spec.ports[0].targetPort",
            "no container of the Pods that the selector finds lists port 8888 (they list 8080)",
            "if nothing listens there, connections are refused",
            id="target port that no Pod lists",
        ),
        pytest.param(
            broken("  type: NodePort\n", "  type: NodePort\n  sessionAffinity: true\n"),
            *(7, "spec.sessionAffinity", "must be text", "write ClientIP or None"),
            id="sessionAffinity: true",
        ),
        pytest.param(
            broken("  type: NodePort\n", '  type: NodePort\n  publishNotReadyAddresses: "yes"\n'),
            *(7, "spec.publishNotReadyAddresses", "not text", "write true or false, without quotes"),
            id="a truth value in quotes",
        ),
        pytest.param(
            broken("    app: web\n", "  - app: web\n"),
            *(8, "spec.selector", "must be a mapping, not a list", "remove the '-'"),
            id="a list as selector",
        ),
        pytest.param(
            broken("    app: web\n", "    app:web\n"),
            *(8, "spec.selector", "a space is missing after ':'", "write 'app: web'"),
            id="a selector without a space",
        ),
        pytest.param(
            broken("{port: 5432}", "'port:5432'"),
            *(42, "spec.ports[0]", "a space is missing after ':'", "write 'port: 5432'"),
            id="a port without a space",
        ),
        pytest.param(
            broken("{port: 5432}", "{port:5432}"),
            *(42, "spec.ports[0].port:5432", "a space is missing after ':'", "write 'port: 5432'"),
            id="a port in braces without a space",
        ),
        pytest.param(
            broken("  ports: [{port: 5432}]", "  ports:\n    -port: 5432"),
            *(43, "spec.ports.-port", "a space is missing after '-'", "write '- port:'"),
            id="a dash without a space",
        ),
        pytest.param(
            broken("  - name: http\n    port: 80\n", "  - name: http\n    -port: 80\n"),
            *(12, "spec.ports[0].-port", "a space is missing after '-'", "write '- port:'"),
            id="a dash too many",
        ),
        pytest.param(
            broken("  name: web\n", "  labels: {a: b}\n"),
            *(3, "metadata", "the object has no name", "add metadata.name"),
            id="no name",
        ),
        pytest.param(
            broken("    app: web\n", "    app: wbe\n"),
            *(9, "spec.selector.app", "app=wbe matches no Pod", "did you mean 'app: web'?"),
            id="a label's value",
        ),
        pytest.param(
            broken("    app: web\n", "    ap: web\n"),
            *(9, "spec.selector.ap", "ap=web matches no Pod", "did you mean 'app: web'?"),
            id="a label",
        ),
        pytest.param(
            broken("    app: web\n", "    tier: front\n"),
            *(8, "spec.selector", "tier=front matches no Pod", "add Pods"),
            id="nothing alike",
        ),
        pytest.param(
            broken("    app: web\n", "    app: 1\n"),
            *(9, "spec.selector.app", "must be text", "in quotes"),
            id="a selector that is no text",
        ),
        pytest.param(
            broken("  name: web-1\n", "  name: web-1\n  namespace: prod\n"),
            *(8, "spec.selector", "web-1 in namespace 'prod'", "one namespace"),
            id="Pods elsewhere",
        ),
        pytest.param(
            broken("status:\n  podIP: 10.244.0.5\n", ""),
            *(8, "spec.selector", "no address is known of Pod web-1", "status.podIP"),
            id="Pods without an address",
        ),
        pytest.param(
            broken("podIP: 10.244.0.5", "podIP: 10.244.0"),
            *(36, "status.podIP", "'10.244.0' is no IP address", ""),
            id="a Pod's address",
        ),
        pytest.param(
            broken("targetPort: http", "targetPort: htpp"),
            *(13, "spec.ports[0].targetPort", "no Pod it selects has a port named 'htpp'", "did you mean 'http'?"),
            id="target port",
        ),
        pytest.param(
            broken("targetPort: http", "targetPort: dns"),
            *(13, "spec.ports[0].targetPort", "is UDP, not TCP", "one protocol"),
            id="target port of another protocol",
        ),
        pytest.param(
            broken("targetPort: http", "targetPort: '8080'"),
            *(13, "spec.ports[0].targetPort", "'8080' in quotes", "8080"),
            id="target port in quotes",
        ),
        pytest.param(
            broken("targetPort: http", "targetPort: Http"),
            *(
                13,
                "spec.ports[0].targetPort",
                "'Http' is not a port's number or name",
                "small letters",
            ),
            id="upper-case target port",
        ),
        pytest.param(
            GOOD + "---\napiVersion: v1\nkind: Endpoints\nmetadata: {name: cache, namespace: x}\nsubsets: []\n",
            *(80, "metadata.name", "no Service x/cache", "write 'namespace: default'"),
            id="Endpoints in another namespace",
        ),
        pytest.param(
            GOOD + "---\napiVersion: v1\nkind: Endpoints\nmetadata: {name: cachee}\nsubsets: []\n",
            *(80, "metadata.name", "no Service default/cachee", "did you mean 'cache'?"),
            id="Endpoints of no Service",
        ),
        pytest.param(
            GOOD
            + "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: x}\naddressType: IPv4\n",
            *(
                80,
                'metadata.labels["kubernetes.io/service-name"]',
                "kubernetes.io/service-name is missing",
                "kubernetes.io/service-name: NAME",
            ),
            id="a slice without the label",
        ),
        pytest.param(
            GOOD
            + "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: x\n"
            + "  labels:\n    kubernetes.io/service-name: cach\naddressType: IPv4\n",
            *(83, 'metadata.labels["kubernetes.io/service-name"]', "no Service default/cach", "did you mean 'cache'?"),
            id="a slice of no Service",
        ),
        pytest.param(
            broken_last("name: redis}", "name: reddis}"),
            *(62, "ports[0].name", "Service default/cache has no port named 'reddis'", "redis"),
            id="a slice's port name",
        ),
        pytest.param(
            broken_last("{port: 5432}", "{port: 5432, name: pg}"),
            *(49, "subsets[0].ports[0].name", "has no port named 'pg'", "leave the name out"),
            id="an Endpoints' port name",
        ),
        pytest.param(
            broken_last("name: redis}", "name: redis, protocol: UDP}"),
            *(62, "ports[0].protocol", "the Service's port is TCP, not UDP", "write TCP"),
            id="a slice's protocol",
        ),
        pytest.param(
            broken("addresses: [10.0.0.2]", "addresses: [10.0.0.256]"),
            *(61, "endpoints[0].addresses[0]", "'10.0.0.256' is no IP address", "such as 10.244.0.2"),
            id="a slice's address",
        ),
        pytest.param(
            broken("addresses: [10.0.0.2]", "addresses: [backend.example.com]"),
            *(61, "endpoints[0].addresses[0]", "'backend.example.com' is no IP address", "names are not resolved"),
            id="a slice's host name",
        ),
        pytest.param(
            broken("addressType: IPv4", "addressType: FQDN").replace("[10.0.0.2]", "[backend.example.com]"),
            *(60, "addressType", "clients are refused: 'FQDN' cannot be proxied", "write IPv4 or IPv6"),
            id="a slice of host names",
        ),
        pytest.param(
            broken("addressType: IPv4", "addressTyp: IPv4"),
            *(60, "addressTyp", "an EndpointSlice has no field", "did you mean 'addressType'?"),
            id="a slice's field",
        ),
        pytest.param(
            broken("ip: 10.0.0.1}", "ip: ten}"),
            *(48, "subsets[0].addresses[0].ip", "'ten' is no IP address", "names are not resolved"),
            id="an Endpoints' address",
        ),
        pytest.param(
            GOOD + "---\napiVersion: v1\nkind: Service\nmetadata: {name: alone}\nspec: {ports: [{port: 80}]}\n",
            *(81, "spec", "nothing here gives it endpoints", "add a selector"),
            id="a Service without anything behind it",
        ),
        pytest.param(
            GOOD + POD, 81, "metadata.name", "Pod default/web-1 is already at stdin:23", "remove one", id="a duplicate"
        ),
        pytest.param(
            broken("  ports: [{port: 5432}]\n", "  clusterIP: 10.96.0.010\n  ports: [{port: 5432}]\n"),
            *(42, "spec.clusterIP", "10.96.0.10 is already the cluster IP of default/web", "choose another"),
            id="a duplicate clusterIP",
        ),
        pytest.param(
            broken("  ports: [{port: 5432}]\n", "  type: NodePort\n  ports: [{port: 5432, nodePort: 30080}]\n"),
            *(43, "spec.ports[0].nodePort", "already the node port of default/web", "choose another"),
            id="a duplicate node port",
        ),
        pytest.param(
            broken("  type: NodePort\n", "  type: NodePort\n  externalTrafficPolicy: local\n"),
            *(7, "spec.externalTrafficPolicy", "'local' is no traffic policy", "Cluster or Local"),
            id="a traffic policy",
        ),
        pytest.param(
            broken("  ports: [{port: 5432}]\n", "  externalTrafficPolicy: Local\n  ports: [{port: 5432}]\n"),
            *(42, "spec.externalTrafficPolicy", "no clients from outside", "leave it out"),
            id="a policy for nobody",
        ),
        pytest.param(
            broken(
                "  type: NodePort\n", "  type: LoadBalancer\n  loadBalancerSourceRanges: [192.0.2.0/24, 10.1.0.0]\n"
            ),
            *(7, "spec.loadBalancerSourceRanges[1]", "'10.1.0.0' is no range of addresses", "write 10.1.0.0/32"),
            id="a source range",
        ),
        pytest.param(
            broken("  type: NodePort\n", "  type: NodePort\n  loadBalancerSourceRanges: [192.0.2.0/24]\n"),
            *(
                7,
                "spec.loadBalancerSourceRanges",
                "counts for Services of type LoadBalancer alone",
                "type: LoadBalancer",
            ),
            id="source ranges without a load balancer",
        ),
        pytest.param(
            broken("  type: NodePort\n", "  type: LoadBalancer\n  healthCheckNodePort: 31000\n"),
            *(7, "spec.healthCheckNodePort", "only with externalTrafficPolicy: Local", "externalTrafficPolicy: Local"),
            id="a health check of nothing",
        ),
        pytest.param(
            broken("  type: NodePort\n", "  type: LoadBalancer\n  loadBalancerIP: 203.0.113.500\n"),
            *(7, "spec.loadBalancerIP", "no IP address", "write one such as"),
            id="a load balancer IP",
        ),
        pytest.param(
            annotated("userspace-proxy/source-ip: client"),
            *(5, "metadata.annotations.userspace-proxy/source-ip", "'client' says no source IP", "transparent"),
            id="a source address",
        ),
        pytest.param(
            annotated("userspace-proxy/source-ip: proxy-protocol-v1"),
            *(
                5,
                "metadata.annotations.userspace-proxy/source-ip",
                "knows no UDP, which port 53 is",
                "proxy-protocol-v2",
            ),
            id="a header before UDP",
        ),
        pytest.param(
            annotated("userspace-proxy/sourceip: node"),
            *(
                5,
                "metadata.annotations.userspace-proxy/sourceip",
                "there is no annotation",
                "userspace-proxy/source-ip",
            ),
            id="an annotation of ours",
        ),
        pytest.param(
            broken(
                "    protocol: UDP\n---",
                "    protocol: UDP\nstatus: {loadBalancer: {ingress: [{ip: 203.0.113.1, ipMode: Vip}]}}\n---",
            ),
            *(19, "status.loadBalancer.ingress[0].ipMode", "'Vip' is not VIP or Proxy", "VIP or Proxy"),
            id="an ipMode",
        ),
        pytest.param(
            broken("    port: 80\n", "    port: 80\n    port: 81\n"),
            *(13, "spec.ports[0].port", "'port' stands twice, 1 line apart", "remove one"),
            id="a key that stands twice",
        ),
        pytest.param(
            broken("  name: web-1\n", "  name: web-1\n  annotations: {a: [1]}\n"),
            *(24, "metadata.annotations.a", "must be text", "indent it"),
            id="an annotation that is no text",
        ),
        pytest.param(
            broken("    app: web\nspec", "    app: web\n    version: 1.10\nspec"),
            *(26, "metadata.labels.version", "must be text, not a number", "in quotes"),
            id="a label that is no text",
        ),
        pytest.param(
            broken("kind: Service", "kind: service").partition("---\n")[0] + POD,
            *(2, "kind", "'service' is no kind", "did you mean Service?"),
            id="a kind in small letters",
        ),
        pytest.param(
            broken("apiVersion: v1\n", "apiVersion: apps/v1\n"),
            *(1, "apiVersion", "'apps/v1' has no Service", "apiVersion: v1"),
            id="an apiVersion",
        ),
        pytest.param(
            broken("apiVersion: v1\n", ""), 1, "apiVersion", "is missing", "apiVersion: v1", id="no apiVersion"
        ),
        pytest.param("<!DOCTYPE html>\n<html>\n", 1, "", "this is HTML", "fetch the raw file", id="HTML"),
    ],
)
def test_a_mistake_is_named_once_with_its_line_and_a_fix(
    text: str, line: int, field: str, problem: str, fix: str
) -> None:
    found = findings(text)

    assert said(found) == [(line, field)], found
    assert problem in found[0]["problem"]
    assert fix in found[0]["mend"]


def test_a_missing_separator_is_one_finding_and_hides_no_object() -> None:
    text = GOOD.replace("---\n", "")
    starts = [number for number, row in enumerate(text.splitlines(), 1) if row.startswith("apiVersion")]

    found = findings(text)

    assert [finding["line"] for finding in found] == starts[1:]
    assert {(finding["problem"], finding["mend"]) for finding in found} == {
        ("a new object begins here", "put '---' on a line before it")
    }


def test_containerport_in_a_service_is_taken_for_targetport_and_the_missing_port_is_named_too() -> None:
    first, second = findings(broken("  ports: [{port: 5432}]", "  ports: [{containerPort: 5432}]"))

    assert (first["field"], first["mend"]) == ("spec.ports[0].containerPort", "did you mean 'targetPort'?")
    assert (second["field"], second["mend"]) == ("spec.ports[0]", "add port")


def test_the_fix_for_a_single_sctp_port_mentions_no_other_ports() -> None:
    found = findings(GOOD.replace("{port: 5432}", "{port: 5432, protocol: SCTP}"))

    assert [finding["mend"] for finding in found] == ["remove the port, or serve it another way"]


@pytest.mark.parametrize(
    "text",
    [
        broken("targetPort: dns", "targetPort: 5353").replace("      protocol: UDP\n", ""),
        broken("targetPort: http", "targetPort: 8888") + POD.replace("web-1", "web-2").replace("ports:", "env:"),
    ],
    ids=["none of the protocol", "none by one of the Pods"],
)
def test_a_target_port_is_not_looked_for_in_a_list_that_is_not_there(text: str) -> None:
    assert findings(text) == []


# ---- ports in the wrong place


def test_ports_at_the_top_level_belong_under_spec() -> None:
    (finding,) = findings(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\nspec:\nports:\n- port: 80\n  targetPort: 8080\n"
    )

    assert (finding["line"], finding["field"]) == (6, "ports")
    assert finding["problem"] == "'ports' stands at the top level, but belongs under 'spec'"
    assert finding["mend"] == "move it there: it begins two columns to the right of 'spec'"


def test_ports_under_metadata_belong_under_spec() -> None:
    (finding,) = findings(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\n  ports:\n  - port: 80\nspec:\n  selector: {app: web}\n"
        + POD
    )

    assert (finding["line"], finding["field"]) == (5, "metadata.ports")
    assert "belongs under 'spec'" in finding["problem"]


def test_ports_under_the_selector_belong_beside_it() -> None:
    (finding,) = findings(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\nspec:\n"
        "  selector:\n    app: web\n    ports:\n    - port: 80\n" + POD
    )

    assert (finding["line"], finding["field"]) == (8, "spec.selector.ports")
    assert "indent it as 'selector' is" in finding["mend"]


def test_a_port_right_under_spec_belongs_into_an_item_of_ports() -> None:
    (finding,) = findings(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\nspec:\n  targetPort: 80\n  selector: {app: web}\n" + POD
    )

    assert (finding["line"], finding["field"]) == (6, "spec.targetPort")
    assert "into an item of 'spec.ports'" in finding["problem"]


def test_ports_that_are_no_list_want_a_dash() -> None:
    (finding,) = findings(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\nspec:\n  selector: {app: web}\n  ports:\n    port: 80\n"
        + POD
    )

    assert (finding["line"], finding["field"]) == (7, "spec.ports")
    assert finding["mend"] == "begin each item with '- '"


# ---- many mistakes


def test_all_mistakes_of_one_object_are_named_at_once() -> None:
    found = findings(
        """\
apiVersion: v1
kind: Service
metadata:
  name: Web
spec:
  clusterIP: none
  type: NodePort
  selectors:
    app: web
  ports:
  - port: 80
    name: HTTP
    nodePort: 8080
  - port: 70000
    protocol: SCTP
  - port: "83"
    name: b
  - port: 84
    name: b
"""
    )

    assert said(found) == [
        (4, "metadata.name"),
        (6, "spec.clusterIP"),
        (8, "spec.selectors"),
        (12, "spec.ports[0].name"),
        (13, "spec.ports[0].nodePort"),
        (14, "spec.ports[1]"),
        (14, "spec.ports[1].port"),
        (15, "spec.ports[1].protocol"),
        (16, "spec.ports[2].port"),
        (19, "spec.ports[3].name"),
    ]


def test_a_broken_document_hides_no_mistake_of_another() -> None:
    found = findings("a: b\n c: d\n---\n" + broken("clusterIP: 10.96.0.10", "clusterIP: none"))

    assert said(found) == [(2, "c"), (10, "spec.clusterIP")]


def test_an_item_of_a_list_is_named_at_its_line() -> None:
    text = """\
apiVersion: v1
kind: List
items:
- apiVersion: v1
  kind: Endpoints
  metadata: {name: A}
- apiVersion: v1
  kind: Endpoints
  metadata: {name: B}
"""
    assert said(findings(text)) == [(6, "metadata.name"), (9, "metadata.name")]


# ---- how it is said


def test_in_a_pipe_each_finding_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text(broken("clusterIP: 10.96.0.10", "clusterIP: none"))
    (tmp_path / "a.yaml").write_text("<html>\n")

    result = check(tmp_path)

    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        f"{tmp_path}/a.yaml:1: this is HTML, not a manifest; fetch the raw file, not the page that shows it",
        f"{tmp_path}/b.yaml:7: spec.clusterIP: 'none' is no IP address; "
        "a headless Service has 'None', with a capital N",
    ]


def test_json_is_a_list_also_where_nothing_is_wrong() -> None:
    result = check("--json", "-", stdin=GOOD)

    assert json.loads(result.stdout) == []
    assert result.exit_code == 0


def shown_in_a_terminal(*arguments: str | Path, **variables: str) -> str:
    """Return the output of `check` with its colour sequences, after exit code 1."""
    ours, theirs = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "CI")}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "userspace_proxy", "check", *map(str, arguments)],
            stdout=theirs,
            stderr=subprocess.PIPE,
            env={**environment, "TERM": "xterm", **variables},
            timeout=20,
            check=False,
        )
        shown = os.read(ours, 65_536).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 1
    return shown


def test_no_color_means_no_colours(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("<html>\n")

    assert "\x1b[31m" in shown_in_a_terminal(tmp_path)
    assert "\x1b" not in shown_in_a_terminal(tmp_path, NO_COLOR="1")


def test_in_a_terminal_faults_are_red_and_notes_yellow(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(TUTORIAL)
    (tmp_path / "b.yaml").write_text("<html>\n")

    shown = shown_in_a_terminal("--strict", tmp_path)

    assert f"\x1b[33m{tmp_path}/a.yaml:11: note: spec.selector: the selector run=my-nginx matches no Pod here" in shown
    assert f"\x1b[31m{tmp_path}/b.yaml:1: " in shown


def test_with_contract_each_field_that_is_set_is_one_line_before_the_findings(tmp_path: Path) -> None:
    file = tmp_path / "web.yaml"
    file.write_text(CONTRACT)

    result = check("--contract", file)

    rows = [row.removeprefix(f"{file}:") for row in result.stdout.splitlines()]
    shown = [row.split(": ", 4)[:4] for row in rows if ": Service default/web: " in row]
    assert [(where, field, treatment) for where, _, field, treatment in shown] == [
        ("1", "apiVersion", "approximated"),
        ("2", "kind", "honoured"),
        ("4", "metadata.name", "honoured"),
        ("5", "metadata.labels.app", "ignored"),
        ("6", "metadata.annotations.userspace-proxy/source-ip", "honoured"),
        ("8", "spec.externalTrafficPolicy", "honoured"),
        ("9", "spec.ports[0].port", "honoured"),
        ("9", "spec.ports[0].appProtocol", "ignored"),
        ("10", "spec.trafficPolicy", "unknown"),
        ("12", "status.loadBalancer.ingress[0].hostname", "ignored"),
    ]
    assert {thing for _, thing, _, _ in shown} == {"Service default/web"}
    assert any(row.startswith("10: spec.trafficPolicy: a Service has no field") for row in rows)
    assert result.exit_code == 1


def test_with_contract_json_has_the_fields_and_the_tests_that_show_them_beside_the_findings() -> None:
    result = check("--contract", "--json", "-", stdin=GOOD)

    told = json.loads(result.stdout)
    assert result.exit_code == 0
    assert told["findings"] == []
    assert {field["object"].partition(" ")[0] for field in told["fields"]} == {
        "Service",
        "Pod",
        "Endpoints",
        "EndpointSlice",
    }
    ready = next(field for field in told["fields"] if field["field"] == "endpoints[0].conditions.ready")
    assert ready["treatment"] == "honoured"
    assert ready["shown_by"]


def test_in_a_terminal_the_fields_that_are_honoured_are_green(tmp_path: Path) -> None:
    file = tmp_path / "web.yaml"
    file.write_text(CONTRACT)

    shown = shown_in_a_terminal("--contract", file)

    assert f"\x1b[32m{file}:8: Service default/web: spec.externalTrafficPolicy: honoured" in shown


@pytest.mark.parametrize(
    ("text", "field", "treatment"),
    [
        (CONTRACT.replace("spec:", "spec:\n  clusterIP: None"), "spec.ports[0].port", "ignored"),
        (CONTRACT.replace("spec:", "spec:\n  clusterIP: None"), "spec.clusterIP", "honoured"),
        (CONTRACT.replace("port: 80,", "port: 80, protocol: SCTP,"), "spec.ports[0].protocol", "ignored"),
        (CONTRACT.replace("port: 80,", "port: 80, protocol: UDP,"), "spec.ports[0].protocol", "honoured"),
        (
            CONTRACT.replace("labels: {", "labels: {service.kubernetes.io/service-proxy-name: x, "),
            "spec.ports[0].port",
            "ignored",
        ),
        (GOOD.replace("{kubernetes.io/service-name: cache}", "{}"), "endpoints[0].addresses", "ignored"),
    ],
)
def test_contract_names_objects_and_values_that_are_not_served(text: str, field: str, treatment: str) -> None:
    told = json.loads(check("--contract", "--json", "-", stdin=text).stdout)

    assert [each["treatment"] for each in told["fields"] if each["field"] == field] == [treatment]


def test_the_services_of_another_proxys_name_are_checked_for_that_proxy() -> None:
    labelled = CONTRACT.replace("labels: {", "labels: {service.kubernetes.io/service-proxy-name: mine, ")
    twice = labelled.replace("ports:", "ports: [{name: same, port: 81}, {name: same, port: 82}] #")
    fault = "spec.ports[1].name: the name 'same' is already that of ports[0]"

    assert fault not in check("-", stdin=twice).output
    assert fault in check("--service-proxy-name", "mine", "-", stdin=twice).output


def test_run_does_not_load_the_contract() -> None:
    code = "import sys; import userspace_proxy.runtime.app, userspace_proxy.cli.run; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert "userspace_proxy.control.tracker" in loaded
    assert not {"userspace_proxy.control.contract", "tomllib"} & {*loaded}


def test_findings_are_sorted_by_file_and_line(tmp_path: Path) -> None:
    for name in ("b", "a"):
        text = broken("clusterIP: 10.96.0.10", "clusterIP: none") if name == "a" else "a: b\n c: d\n"
        (tmp_path / f"{name}.yaml").write_text(text + "---\nkind: Service\nmetadata: {}\n")

    result = check(tmp_path / "b.yaml", tmp_path / "a.yaml")

    assert [row.partition(": ")[0].rpartition("/")[2] for row in result.stdout.splitlines()] == [
        "a.yaml:7",
        "a.yaml:79",
        "b.yaml:2",
        "b.yaml:5",
    ]


@pytest.mark.parametrize("text", ["", "# nothing\n---\n"])
def test_a_file_without_an_object_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)

    result = check(tmp_path / "a.yaml")

    assert result.exit_code == 1
    assert result.output == f"userspace-proxy: no object found in {tmp_path}/a.yaml\n"


def test_a_folder_without_manifests_is_an_error(tmp_path: Path) -> None:
    result = check("--json", tmp_path)

    assert result.exit_code == 1
    assert json.loads(result.stdout) == []
    assert result.stderr.endswith(f"userspace-proxy: no object found in {tmp_path}\n")


def test_of_many_folders_that_are_not_searched_three_are_named_and_the_others_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(7):
        (tmp_path / f"app-{number}").mkdir()
        (tmp_path / f"app-{number}" / "web.yaml").write_text(GOOD)

    check(tmp_path)

    assert caplog.messages[-1].endswith(f"name them: {tmp_path}/app-0 {tmp_path}/app-1 {tmp_path}/app-2 and 4 more")


def test_a_path_that_does_not_exist_is_answered_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)

    result = check(tmp_path, tmp_path / "nothing.yaml")

    assert result.exit_code == 1
    assert result.output == f"userspace-proxy: {tmp_path}/nothing.yaml: no such file or folder\n"


def test_a_file_that_is_no_text_is_a_finding_and_hides_no_other(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"a: b\nname: caf\xe9\n")
    (tmp_path / "b.yaml").write_text(broken("clusterIP: 10.96.0.10", "clusterIP: none"))

    first, second = json.loads(check("--json", tmp_path).stdout)

    assert (first["file"], first["line"]) == (f"{tmp_path}/a.yaml", 2)
    assert "it is not UTF-8 text" in first["problem"]
    assert first["mend"] == "save it as UTF-8"
    assert second["field"] == "spec.clusterIP"


# ---- `render` reads as `run` does


def render(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "userspace_proxy", "render", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def test_render_prints_what_can_be_served_and_names_the_rest_as_check_does() -> None:
    text = broken("  ports: [{port: 5432}]", "  ports:\n    port: 5432")
    (finding,) = findings(text)

    done = render("-", stdin=text)

    assert done.returncode == 1
    assert "10.96.0.10" in done.stdout
    assert f"{finding['field']}: {finding['problem']}; {finding['mend']}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_render_takes_the_first_of_an_object_that_stands_twice_and_says_so() -> None:
    done = render("-", stdin=GOOD + "---\n" + GOOD.partition("---")[0].replace("10.96.0.10", "10.96.0.77"))

    assert done.returncode == 1
    assert "10.96.0.10" in done.stdout
    assert "10.96.0.77" not in done.stdout
    assert "Service default/web is already at stdin:4" in done.stderr


def test_render_skips_a_file_of_another_tool() -> None:
    done = render("-", stdin=GOOD + "---\nreplicaCount: 1\n")

    assert (done.returncode, done.stderr) == (0, "")


def test_render_ends_well_where_nothing_is_wrong() -> None:
    done = render("-", stdin=GOOD)

    assert (done.returncode, done.stderr) == (0, "")
    assert "10.96.0.10" in done.stdout


def test_render_of_a_service_that_cannot_be_served_fails() -> None:
    done = render("-", stdin=broken("clusterIP: 10.96.0.10", "clusterIP: none"))

    assert done.returncode == 1
    assert "a headless Service has 'None', with a capital N" in done.stderr


def test_render_of_nothing_at_all_fails() -> None:
    done = render("-")

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "userspace-proxy: no object found in stdin\n"


# ---- what is no manifest at all


def test_a_document_that_contains_itself_is_a_finding_and_hides_no_other() -> None:
    found = findings("&l\nkind: List\nitems: [*l]\n---\n" + broken("clusterIP: 10.96.0.10", "clusterIP: 127.0.0.1"))

    assert [(finding["field"], finding["problem"].partition(", ")[0]) for finding in found] == [
        ("items", "what the anchor 'l' stands for contains itself"),
        ("spec.clusterIP", "'127.0.0.1' is a loopback address"),
    ]


def test_an_address_that_no_backend_can_have_is_a_fault() -> None:
    found = findings(GOOD.replace("[{ip: 10.0.0.1}]", "[{ip: 0.0.0.0}]").replace("[10.0.0.2]", "[224.0.0.1]"))

    assert [finding["field"] for finding in found] == ["subsets[0].addresses[0].ip", "endpoints[0].addresses[0]"]


def test_a_pipe_is_read_and_a_device_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=[GOOD])
    writer.start()

    assert check(pipe).output == "9 objects, nothing wrong\n"
    assert "/dev/null: neither a file, a folder nor a pipe" in check("/dev/null").output
    writer.join(10)


def test_a_file_that_cannot_be_one_of_manifests_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.yaml")).write_text(GOOD)
    with (tmp_path / "large.yaml").open("w") as file:
        file.truncate(300 * 1024 * 1024)

    result = check("--json", tmp_path)

    assert [(finding["file"], finding["problem"]) for finding in json.loads(result.stdout)] == [
        (f"{tmp_path}/\\xff.yaml", "cannot be read: its name is not UTF-8 text"),
        (f"{tmp_path}/large.yaml", "cannot be read: it is larger than 256 MB"),
    ]
