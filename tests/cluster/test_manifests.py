"""A real API server accepts examples/kubernetes: it knows each field, and each value is valid (dry run)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.control_plane import ControlPlane
from tests.net.world import wait_until

pytestmark = pytest.mark.cluster

MANIFESTS = Path(__file__).parents[2] / "examples" / "kubernetes"
DRY = "?dryRun=All&fieldValidation=Strict"
PRIORITIES = "/apis/scheduling.k8s.io/v1/priorityclasses"
PATHS = {
    "ServiceAccount": "/api/v1/namespaces/kube-system/serviceaccounts",
    "ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
    "DaemonSet": "/apis/apps/v1/namespaces/kube-system/daemonsets",
    "Pod": "/api/v1/namespaces/kube-system/pods",
}


@pytest.mark.parametrize("file", sorted(MANIFESTS.glob("*.yaml")), ids=lambda file: file.name)
def test_an_api_server_accepts_the_examples(plane: ControlPlane, file: Path) -> None:
    for path, name in (("/api/v1/namespaces", "kube-system"), (PRIORITIES, "system-node-critical")):
        wait_for(plane, path, name)
    for given in yaml.safe_load_all(file.read_text()):
        if given["kind"] == "DaemonSet":
            pod = {"metadata": {"generateName": "userspace-proxy-", **given["spec"]["template"]["metadata"]}}
            made = plane.ask("POST", PATHS["Pod"] + DRY, {**pod, "spec": given["spec"]["template"]["spec"]})
            assert made["spec"]["priority"] == 2_000_001_000
            if minor_version(plane) < 22:  # before there was maxSurge
                del given["spec"]["updateStrategy"]
        made = plane.ask("POST", PATHS[given["kind"]] + DRY, given)
        assert missing(given, made) == []


def wait_for(plane: ControlPlane, path: str, name: str) -> None:
    wait_until(lambda: name in plane.names(path), f"the API server made {name}", 20.0)


def minor_version(plane: ControlPlane) -> int:
    return int(re.findall(r"\d+", plane.ask("GET", "/version")["gitVersion"])[1])


def missing(given: Any, made: Any, where: str = "") -> list[str]:
    """Return the fields of *given* that the server dropped because it does not know them."""
    if isinstance(given, dict):
        lost = [f"{where}.{key}" for key in given if key not in made]
        return lost + [m for key in given if key in made for m in missing(given[key], made[key], f"{where}.{key}")]
    if isinstance(given, list):
        pairs = enumerate(zip(given, made, strict=False))
        return [m for index, (g, m_) in pairs for m in missing(g, m_, f"{where}[{index}]")]
    return []
