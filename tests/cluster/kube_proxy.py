"""The real kube-proxy in the contract's world, with the API server of the tests: its behaviour is our reference.

It needs nothing of a control plane, so that one binary is enough. Versions before 1.21 read v1beta1 of EndpointSlices.
"""

from __future__ import annotations

import copy
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.apiserver import NODES, OLD_SLICES, SERVICES, SLICES, ApiServerThread, Object
from tests.net.contract.cluster import CLUSTER_CIDRS, NODE, Cluster
from tests.net.contract.services import Given, node_object
from tests.net.world import wait_until
from tests.sources.test_kubernetes import kubeconfig
from userspace_proxy.lab import connect

Version = tuple[int, int]
_PATHS = {"Service": SERVICES, "EndpointSlice": SLICES, "Node": NODES}
_NONE = ("--conntrack-max-per-core", "--conntrack-tcp-timeout-established", "--conntrack-tcp-timeout-close-wait")
_HEALTH = 10256


def kube_proxy_binary() -> Path:
    """Return the kube-proxy of KUBE_BIN."""
    found = Path(os.environ.get("KUBE_BIN", "/nowhere")) / "kube-proxy"
    if not found.exists():
        pytest.skip("KUBE_BIN has no kube-proxy")
    return found


def version_of(binary: Path) -> Version:
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
    found = re.search(r"v(\d+)\.(\d+)", said)
    assert found, said
    return int(found[1]), int(found[2])


class KubeProxy:
    """kube-proxy on node-1."""

    def __init__(self, cluster: Cluster, folder: Path, mode: str, *flags: str) -> None:
        self.node = cluster.node
        self.mode = mode
        self.binary = kube_proxy_binary()
        self.version = version_of(self.binary)
        self.log_file = folder / "kube-proxy.log"
        with cluster.node.inside():
            sock = socket.create_server(("127.0.0.1", 0))
        self.api = ApiServerThread(sock)
        self._config = kubeconfig(folder, self.api.server.url)
        self._flags = flags
        self._process: subprocess.Popen[bytes] | None = None
        self.put(node_object())

    def put(self, given: Object) -> None:
        path = _PATHS[given["kind"]]
        self.api.do(self.api.server.put(path, given))
        if path == SLICES and self.version < (1, 21):
            self.api.do(self.api.server.put(OLD_SLICES, as_before_1_21(given)))

    def give(self, *given: Given) -> None:
        """Put Services in place, or other versions of them."""
        for each in given:
            for one in each.objects():
                self.put(with_defaults(one))

    def start(self) -> None:
        """Start it; return when it reports health and its rules no longer change."""
        gates = ("--feature-gates", "IPv6DualStack=true") if self.version < (1, 21) else ()
        self._process = self.node.start(
            *(str(self.binary), "--kubeconfig", str(self._config), "--hostname-override", NODE),
            *("--proxy-mode", self.mode, "--detect-local-mode", "ClusterCIDR", "--cluster-cidr", CLUSTER_CIDRS),
            *(word for flag in _NONE for word in (flag, "0")),  # no sysctl but those of a namespace
            *("--healthz-bind-address", f"127.0.0.1:{_HEALTH}", *gates, *self._flags),
            log=self.log_file,
        )
        wait_until(self._is_healthy, "kube-proxy is healthy", 40.0)
        told: list[str] = []

        def is_at_rest() -> bool:
            time.sleep(1.5)  # it waits a second between two syncs
            told.append(self.rules_text())
            return len(told) > 1 and told[-1] == told[-2]

        wait_until(is_at_rest, "its rules are at rest", 60.0)
        assert "Sync failed" not in self.log(), self.log()[-3000:]

    def _is_healthy(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"kube-proxy ended: {self.log()[-3000:]}"
        try:
            with connect(self.node, "127.0.0.1", _HEALTH) as sock:
                sock.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
                return b" 200 " in sock.recv(64)
        except OSError:
            return False

    def log(self) -> str:
        return self.log_file.read_text()

    def rules_text(self) -> str:
        """Return every rule of its own, without counters."""
        if self.mode == "nftables":
            return self.node.run("nft", "--stateless", "list", "ruleset").stdout
        saved = [self.node.run(f"{family}-save").stdout for family in ("iptables", "ip6tables")]
        return "\n".join(line for text in saved for line in text.splitlines() if line.startswith("-A "))

    def close(self) -> None:
        """End it and take its rules away."""
        try:
            if self._process is not None:
                self._process.terminate()
                try:
                    self._process.wait(10)
                except subprocess.TimeoutExpired:
                    self._process.kill()
                    self._process.wait(10)
                self.node.run(str(self.binary), "--cleanup", check=False, timeout_s=60)
        finally:
            self.api.close()


def with_defaults(given: Mapping[str, Any]) -> Object:
    """Return the object with the defaults of a real API server, which kube-proxy relies on."""
    made: Object = json.loads(json.dumps(given))
    for port in (made["spec"] if made["kind"] == "Service" else made).get("ports") or ():
        port.setdefault("name", "")
        port.setdefault("protocol", "TCP")
    return made


def as_before_1_21(given: Object) -> Object:
    """Return an EndpointSlice in the words of v1beta1: no hints, and where an endpoint is stands in its topology."""
    old: dict[str, Any] = copy.deepcopy(given)
    old["apiVersion"] = "discovery.k8s.io/v1beta1"
    for endpoint in old["endpoints"] or ():
        node = endpoint.pop("nodeName", None)
        endpoint.pop("hints", None)
        endpoint["topology"] = {"kubernetes.io/hostname": node} if node else None
    return old
