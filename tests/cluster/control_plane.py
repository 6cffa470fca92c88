"""A real control plane on the lab's node: etcd, kube-apiserver and the endpoint controllers of kube-controller-manager.

The binaries come from the folder KUBE_BIN; any release from 1.21 on will do. Pods are written by the tests, status and
all: no scheduler and no kubelet is there to object.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shlex
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml

from tests.net.world import wait_until
from userspace_proxy.lab import Host, connect

ETCD, ETCD_PEERS, API, SCHEDULE = 2379, 2380, 6443, 10257
SERVICE_RANGES = "10.96.0.0/16,fd00:96::/112"
# Who may do what is decided by RBAC: the proxy is who kube-proxy is, and no more.
TOKENS = """\
admin-token,admin,1,system:masters
proxy-token,system:kube-proxy,2
half-token,half,3
"""
# The names before 1.28, which stay as aliases.
CONTROLLERS = "endpoint,endpointslice,endpointslicemirroring"

CORE = "/api/v1/namespaces/default"
SERVICES = f"{CORE}/services"
ENDPOINTS = f"{CORE}/endpoints"
PODS = f"{CORE}/pods"
SLICES = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"
NODES = "/api/v1/nodes"
NODE_NAME = "node-1"

Object = dict[str, Any]


class ApiError(Exception):
    """The API server refused; `code` is its status."""

    def __init__(self, code: int, said: str) -> None:
        super().__init__(f"{code} {said}")
        self.code = code


class ControlPlane:
    """Processes of a cluster's brain; each can be killed and started again."""

    def __init__(self, node: Host, folder: Path, certificates: Path) -> None:
        self.node = node
        self.folder = folder
        self._bin = Path(os.environ["KUBE_BIN"])
        self._certificates = certificates
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._local = threading.local()
        (folder / "tokens.csv").write_text(TOKENS)
        openssl = ("openssl", "genrsa", "-out", str(folder / "accounts.key"), "2048")
        subprocess.run(openssl, check=True, capture_output=True, timeout=30)
        self.admin_config = self.kubeconfig("admin", "admin-token")
        self.proxy_config = self.kubeconfig("kube-proxy", "proxy-token")

    def kubeconfig(self, name: str, token: str, port: int = API) -> Path:
        path = self.folder / f"{name}.kubeconfig"
        cluster = {
            "server": f"https://127.0.0.1:{port}",
            "certificate-authority": str(self._certificates / "ca.crt"),
        }
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "lab", "cluster": cluster}],
            "users": [{"name": name, "user": {"token": token}}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": name}}],
            "current-context": "lab",
        }
        path.write_text(yaml.safe_dump(config))
        return path

    # ---- processes

    def start(self) -> None:
        self.start_etcd()
        self.start_api()
        self.start_controllers()

    def start_etcd(self) -> None:
        url, peers = f"http://127.0.0.1:{ETCD}", f"http://127.0.0.1:{ETCD_PEERS}"
        self._start(
            "etcd",
            *("--data-dir", str(self.folder / "etcd"), "--unsafe-no-fsync"),
            *("--listen-client-urls", url, "--advertise-client-urls", url),
            *("--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers),
            *("--initial-cluster", f"default={peers}"),
        )
        wait_until(lambda: self._is_open(ETCD), "etcd answers", 20.0)

    def start_api(self) -> None:
        accounts = str(self.folder / "accounts.key")
        self._start(
            "kube-apiserver",
            *("--etcd-servers", f"http://127.0.0.1:{ETCD}", "--secure-port", str(API)),
            *("--bind-address", "127.0.0.1", "--advertise-address", "192.168.50.1"),
            *("--tls-cert-file", str(self._certificates / "server.crt")),
            *("--tls-private-key-file", str(self._certificates / "server.key")),
            *("--cert-dir", str(self.folder), "--token-auth-file", str(self.folder / "tokens.csv")),
            *("--authorization-mode", "RBAC", "--disable-admission-plugins", "ServiceAccount"),
            *("--service-account-issuer", "https://lab", "--service-account-key-file", accounts),
            *("--service-account-signing-key-file", accounts, "--service-cluster-ip-range", SERVICE_RANGES),
        )
        wait_until(self._is_ready, "the API server is ready", 60.0)
        with contextlib.suppress(ApiError):  # it makes this namespace itself, a little later
            self.create("/api/v1/namespaces", "default")

    def start_controllers(self) -> None:
        if not (self._bin / "kube-controller-manager").exists():
            return  # the tests of scale write what controllers would
        self._start(
            "kube-controller-manager",
            *("--kubeconfig", str(self.admin_config), "--controllers", CONTROLLERS),
            *("--leader-elect=false", "--secure-port", str(SCHEDULE), "--cert-dir", str(self.folder)),
        )

    def kill(self, name: str) -> None:
        """End *name* as a machine that loses its power."""
        process = self._running.pop(name)
        process.kill()
        process.wait(10)

    def close(self) -> None:
        self.end_thread()
        for name in reversed(list(self._running)):
            self.kill(name)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def _start(self, name: str, *arguments: str) -> None:
        more = shlex.split(os.environ.get(f"{name.upper().replace('-', '_')}_ARGS", ""))
        self._running[name] = self.node.start(str(self._bin / name), *arguments, *more, log=self.folder / f"{name}.log")

    def _check(self) -> None:
        for name, process in self._running.items():
            assert process.poll() is None, f"{name} ended: {self.log(name)[-3000:]}"

    def _is_open(self, port: int) -> bool:
        self._check()
        with contextlib.suppress(OSError):
            connect(self.node, "127.0.0.1", port, 1.0).close()
            return True
        return False

    def _is_ready(self) -> bool:
        self._check()
        with contextlib.suppress(OSError, ApiError):
            self.ask("GET", NODES)
            return True
        return False

    def back_up(self) -> None:
        """Save a snapshot of etcd."""
        self.kill("kube-apiserver")
        self.kill("etcd")
        shutil.copytree(self.folder / "etcd", self.folder / "backup")
        self.start_etcd()
        self.start_api()

    def restore(self) -> None:
        """Restore the snapshot; resource versions go back as well."""
        self.kill("kube-apiserver")
        self.kill("etcd")
        shutil.rmtree(self.folder / "etcd")
        (self.folder / "backup").rename(self.folder / "etcd")
        self.start_etcd()
        self.start_api()

    def compact(self) -> None:
        """Compact the history up to now, as the API server has etcd do every five minutes."""
        version = self.ask("GET", SERVICES)["metadata"]["resourceVersion"]
        connection = http.client.HTTPConnection("127.0.0.1", ETCD)
        connection.sock = connect(self.node, "127.0.0.1", ETCD, 10.0)
        connection.request("POST", "/v3/kv/compaction", json.dumps({"revision": version, "physical": True}))
        answer = connection.getresponse()
        said = answer.read()
        assert answer.status == 200, said
        connection.close()

    # ---- objects

    def ask(self, method: str, path: str, body: object = None, kind: str = "application/json") -> Object:
        """Ask the API server as its administrator, by one connection a thread.

        Raises:
            ApiError: it refused.
            OSError: it does not answer.
        """
        connection = getattr(self._local, "connection", None) or self._connect()
        try:
            headers = {"Authorization": "Bearer admin-token", "Content-Type": kind}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            said = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self._forget(error)
        if answer.status >= 400:
            raise ApiError(answer.status, said.decode(errors="replace"))
        found: Object = json.loads(said)
        return found

    def end_thread(self) -> None:
        """Close this thread's connection; the next request opens a new one."""
        if (connection := getattr(self._local, "connection", None)) is not None:
            connection.close()
            self._local.connection = None

    def _connect(self) -> http.client.HTTPSConnection:
        context = ssl.create_default_context(cafile=str(self._certificates / "ca.crt"))
        connection = http.client.HTTPSConnection("127.0.0.1", API, context=context)
        connection.sock = context.wrap_socket(connect(self.node, "127.0.0.1", API, 30.0), server_hostname="127.0.0.1")
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._local.connection = connection
        return connection

    def _forget(self, error: Exception) -> NoReturn:
        self._local.connection.close()
        self._local.connection = None
        raise ConnectionError(f"the API server does not answer: {error}") from error

    def create(self, path: str, name: str, *, labels: Mapping[str, str | None] | None = None, **fields: Any) -> Object:
        """Create an object; return it as the server made it."""
        return self.ask("POST", path, {"metadata": {"name": name, "labels": labels}, **fields})

    def patch(self, path: str, name: str, change: object, part: str = "") -> Object:
        return self.ask("PATCH", f"{path}/{name}{part}", change, "application/merge-patch+json")

    def delete(self, path: str, name: str) -> None:
        self.ask("DELETE", f"{path}/{name}", {"gracePeriodSeconds": 0, "propagationPolicy": "Background"})

    def delete_all(self) -> None:
        """Delete all Services but the API server's own, and with them what the controllers made for them."""
        for path in (PODS, SERVICES, ENDPOINTS, SLICES):
            for name in self.names(path):
                if name != "kubernetes":
                    with contextlib.suppress(ApiError):  # 404: a controller was quicker
                        self.delete(path, name)

    def names(self, path: str) -> list[str]:
        """Return the names of the existing objects; none if the server does not know the kind."""
        with contextlib.suppress(ApiError):
            return [found["metadata"]["name"] for found in self.ask("GET", path)["items"] or ()]
        return []

    def run_pod(self, name: str, *ips: str, labels: Mapping[str, str], ready: bool = True) -> None:
        """Write a Pod as if it ran on the lab's node."""
        container = {"name": "server", "image": "server", "ports": [{"name": "http", "containerPort": 8080}]}
        spec = {"nodeName": NODE_NAME, "containers": [container], "terminationGracePeriodSeconds": 600}
        self.create(PODS, name, labels=labels, spec=spec)
        self.set_ready(name, ready, *ips)

    def set_ready(self, name: str, ready: bool, *ips: str) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        condition = {"type": "Ready", "status": "True" if ready else "False", "lastTransitionTime": now}
        status: Object = {"phase": "Running", "conditions": [condition]}
        if ips:
            status |= {"podIP": ips[0], "podIPs": [{"ip": ip} for ip in ips]}
        self.patch(PODS, name, {"status": status}, "/status")


@contextlib.contextmanager
def control_plane(node: Host, folder: Path, certificates: Path) -> Iterator[ControlPlane]:
    plane = ControlPlane(node, folder, certificates)
    try:
        plane.start()
        yield plane
    finally:
        plane.close()
