"""Many Services, from files and from an API server: time to ready, one change to traffic, memory; a restart.

Run it with `make bench-scale`. It builds its hosts in private namespaces and prints the figures.
"""

from __future__ import annotations

import argparse
import compileall
import json
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

import userspace_proxy
from benchmarks.memory import pss_kib
from tests.apiserver import NODES, SERVICES, SLICES, ApiServerThread
from userspace_proxy.compare.meters import children, process_cpu_s
from userspace_proxy.lab import (
    Host,
    Lab,
    ServiceLab,
    ask,
    build_service_lab,
    enter_namespaces,
    prepare,
    start_nginx,
    start_proxy,
    wait_until,
)

_CHANGES = 9
# Idle CPU is measured for _IDLE_S, from _SETTLE_S after the first answer on: the checks of manifests are over by then.
_SETTLE_S, _IDLE_S = 8.0, 10.0

_MANIFEST = """\
apiVersion: v1
kind: Service
metadata:
  name: svc-{number}
  labels: {{app: svc-{number}, team: team-{team}}}
spec:
  selector: {{app: svc-{number}}}
  clusterIP: {ip}
  ports:
  - name: http
    port: 80
    targetPort: 8080
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata:
  name: svc-{number}-abcde
  labels:
    kubernetes.io/service-name: svc-{number}
addressType: IPv4
ports:
- name: http
  port: 8080
  protocol: TCP
endpoints:
{endpoints}---
"""
_ENDPOINT = """\
- addresses: [{ip}]
  conditions: {{ready: {ready}, serving: {ready}, terminating: false}}
"""

_KUBECONFIG = """\
apiVersion: v1
kind: Config
current-context: bench
contexts:
- name: bench
  context: {{cluster: bench, user: bench}}
clusters:
- name: bench
  cluster: {{server: "{url}"}}
users:
- name: bench
  user: {{}}
"""


def service_ip(number: int, prefix: str = "10.96") -> str:
    """Return the cluster IP of Service *number* in the range PREFIX.0.0/16."""
    return f"{prefix}.{number // 250 + 1}.{number % 250 + 1}"


def manifest(
    services: int,
    *,
    probe_pod: int,
    prefix: str = "10.96",
    numbers: Iterable[int] | None = None,
    endpoints: int = 2,
) -> str:
    """Return *services* Services with *endpoints* each; the last one has a single ready pod, *probe_pod*.

    Two endpoints of each are pods, further ones only addresses. *numbers*: those to return; default: all.
    """
    parts = []
    for number in range(services) if numbers is None else numbers:
        pods = (probe_pod, probe_pod) if number == services - 1 else (0, 1)
        others = range(number * endpoints, number * endpoints + endpoints - 2)
        of_slice = "".join(_ENDPOINT.format(ip=ServiceLab.pod_ip(pod), ready="true") for pod in pods)
        ready = "false" if number == services - 1 else "true"  # the last Service is asked
        ips = (service_ip(i % 60_000, f"10.{200 + i // 60_000}") for i in others)
        of_slice += "".join(_ENDPOINT.format(ip=ip, ready=ready) for ip in ips)
        ip = service_ip(number, prefix)
        parts.append(_MANIFEST.format(number=number, team=number % 20, ip=ip, endpoints=of_slice))
    return "".join(parts)


class Manifests:
    """Services in *files* files. If there are several, the Service that changes has its own."""

    def __init__(self, folder: Path, files: int, endpoints: int) -> None:
        self.files = files
        self.endpoints = endpoints
        self.folder = folder / "manifests"
        self.folder.mkdir()
        self.arguments = [str(self.folder)]

    def write(self, services: int) -> None:
        for file in self.folder.iterdir():
            file.unlink()
        size = -(-(services - 1) // max(1, self.files - 1))
        for start in range(0, services - 1, size) if self.files > 1 else ():
            numbers = range(start, min(start + size, services - 1))
            text = manifest(services, probe_pod=0, numbers=numbers, endpoints=self.endpoints)
            (self.folder / f"{start}.yaml").write_text(text)
        self.write_last(services, 0)

    def write_last(self, services: int, pod: int) -> None:
        """Replace the file of the last Service, whose endpoint is *pod* from now on."""
        numbers = (services - 1,) if self.files > 1 else range(services)
        temporary = self.folder / "last.new"
        temporary.write_text(manifest(services, probe_pod=pod, numbers=numbers, endpoints=self.endpoints))
        temporary.replace(self.folder / "last.yaml")

    def figures(self) -> dict[str, float]:
        size_mb = round(sum(file.stat().st_size for file in self.folder.iterdir()) / 1e6, 1)
        return {"manifest_files": self.files, "manifest_mb": size_mb}


class ApiObjects:
    """The same Services in an API server on *node*: that of the tests, in a thread."""

    def __init__(self, node: Host, folder: Path, endpoints: int) -> None:
        self.endpoints = endpoints
        with node.inside():
            sock = socket.create_server(("127.0.0.1", 0))
        self.api = ApiServerThread(sock)
        self.api.server.bookmark_s = 60.0  # as a real one: none while an idle proxy is measured
        self.api.do(self.api.server.put(NODES, {"metadata": {"name": "node"}}))
        file = folder / "kubeconfig"
        file.write_text(_KUBECONFIG.format(url=self.api.server.url))
        self.arguments = ["--kubeconfig", str(file), "--hostname-override", "node"]

    def write(self, services: int) -> None:
        self.api.do(self._put_all(manifest(services, probe_pod=0, endpoints=self.endpoints)))

    async def _put_all(self, text: str) -> None:
        for given in yaml.load_all(text, yaml.CSafeLoader):
            if given:
                await self._put(given)
        for kind in self.api.server.kinds.values():
            kind.history.clear()  # a watch looks through all of it

    async def _put(self, given: dict[str, Any]) -> None:
        given["metadata"]["namespace"] = "default"
        if given["kind"] == "Service":
            given["spec"]["clusterIPs"] = [given["spec"]["clusterIP"]]
        await self.api.server.put(SERVICES if given["kind"] == "Service" else SLICES, given)

    def write_last(self, services: int, pod: int) -> None:
        """Change the EndpointSlice of the last Service, whose endpoint is *pod* from now on."""
        text = manifest(services, probe_pod=pod, numbers=(services - 1,), endpoints=self.endpoints)
        self.api.do(self._put(list(yaml.safe_load_all(text))[1]))

    def figures(self) -> dict[str, float]:
        return {}


class Bench:
    """Runs the proxy for the Services of an origin."""

    def __init__(self, world: ServiceLab, folder: Path, rules: str, origin: Manifests | ApiObjects) -> None:
        self.world = world
        self.rules = rules
        self.origin = origin
        self.log = folder / "log"

    def start(self) -> tuple[subprocess.Popen[bytes], float]:
        """Start the proxy; return it and the seconds until it was ready."""
        started_at = time.monotonic()
        proxy = start_proxy(self.world.node, None, self.log, *self.origin.arguments, "--rules", self.rules)
        return proxy, time.monotonic() - started_at

    def wait_for(self, services: int, pod: str) -> None:
        """Wait until *pod* answers for the last Service."""
        ip = service_ip(services - 1)
        wait_until(lambda: ask(self.world.client, ip, timeout_s=1.0) == pod, f"{pod} does not answer", poll_s=0.001)

    def change_to_traffic_s(self, services: int) -> float:
        """Return the median time from a change of the last Service to an answer of the new endpoint."""
        took = []
        for turn in range(_CHANGES):
            pod = (turn + 1) % 2
            started_at = time.monotonic()
            self.origin.write_last(services, pod)
            self.wait_for(services, f"pod{pod + 1}")
            took.append(time.monotonic() - started_at)
        return statistics.median(took)

    def scale(self, services: int) -> dict[str, float]:
        self.origin.write(services)
        proxy, ready_s = self.start()
        self.wait_for(services, "pod1")
        workers = children(proxy.pid)
        result = {
            "services": services,
            **self.origin.figures(),
            "ready_s": round(ready_s, 2),
            "control_cpu_s": round(process_cpu_s([proxy.pid]), 2),
            "worker_cpu_s": round(process_cpu_s(workers), 2),
        }
        time.sleep(_SETTLE_S)
        idle = {"control": [proxy.pid], "worker": workers}
        before = {name: process_cpu_s(pids) for name, pids in idle.items()}
        time.sleep(_IDLE_S)
        for name, pids in idle.items():
            result[f"{name}_idle_cpu_percent"] = round((process_cpu_s(pids) - before[name]) / _IDLE_S * 100, 2)
            result[f"{name}_pss_mb"] = round(pss_kib(pids) / 1024, 1)
        result["change_to_traffic_ms"] = round(self.change_to_traffic_s(services) * 1000, 1)
        result["pss_after_changes_mb"] = round(pss_kib([proxy.pid, *workers]) / 1024, 1)
        started_at = time.monotonic()
        proxy.send_signal(signal.SIGTERM)
        proxy.wait(30)
        result["stop_s"] = round(time.monotonic() - started_at, 2)
        return result

    def restart(self, services: int) -> dict[str, float]:
        self.origin.write(services)
        proxy, _ = self.start()
        proxy.kill()
        proxy.wait(5)
        proxy, ready_s = self.start()
        proxy.terminate()
        proxy.wait(10)
        return {"services": services, "ready_after_kill_9_s": round(ready_s, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--services", type=int, default=10_000)
    parser.add_argument("--endpoints", type=int, default=2, help="endpoints of each Service")
    parser.add_argument("--files", type=int, default=2, help="manifest files; of several, one is changed")
    parser.add_argument("--origin", choices=["files", "api", "both"], default="both", help="where the Services are")
    parser.add_argument("--rules", choices=["nftables", "iptables"], default="nftables")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    enter_namespaces(sys.argv[1:], {}, module="benchmarks.scale")
    prepare()
    compileall.compile_dir(Path(userspace_proxy.__file__).parent, quiet=1)  # as those of an installed package are
    with tempfile.TemporaryDirectory() as folder, Lab() as lab:
        world = build_service_lab(lab, pods=2)
        for pod in world.pods:
            start_nginx(pod, Path(folder))
        results = {}
        if arguments.origin != "api":
            manifests = Manifests(Path(folder), arguments.files, arguments.endpoints)
            bench = Bench(world, Path(folder), arguments.rules, manifests)
            results = {"files": bench.scale(arguments.services), "restart": bench.restart(100)}
        if arguments.origin != "files":
            objects = ApiObjects(world.node, Path(folder), arguments.endpoints)
            bench = Bench(world, Path(folder), arguments.rules, objects)
            results["api"] = bench.scale(arguments.services)
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    for name, figures in results.items():
        print(f"{name} ({arguments.rules})")
        for figure, value in figures.items():
            print(f"  {figure:24} {value:>10}")


if __name__ == "__main__":
    main()
