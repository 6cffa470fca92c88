"""10,000 Services: time to ready, one change to traffic, memory; and a restart after kill -9.

Run it with `make bench-scale`. It builds its hosts in namespaces of its own and prints what it measured.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from userspace_proxy.lab import Lab, ServiceLab, ask, build_service_lab, command_in_namespaces, prepare, start_nginx

_INSIDE = "USERSPACE_PROXY_BENCH_IN_NAMESPACES"
_CHANGES = 9

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
- addresses: [{first}]
  conditions: {{ready: true, serving: true, terminating: false}}
- addresses: [{second}]
  conditions: {{ready: true, serving: true, terminating: false}}
---
"""


def service_ip(number: int) -> str:
    return f"10.96.{number // 250 + 1}.{number % 250 + 1}"


def manifest(services: int, *, probe_pod: int) -> str:
    """Return *services* Services with two endpoints each; the last one has a single pod, *probe_pod*."""
    parts = []
    for number in range(services):
        first, second = ServiceLab.pod_ip(0), ServiceLab.pod_ip(1)
        if number == services - 1:
            first = second = ServiceLab.pod_ip(probe_pod)
        parts.append(
            _MANIFEST.format(number=number, team=number % 20, ip=service_ip(number), first=first, second=second)
        )
    return "".join(parts)


def pss_mb(pid: int) -> float:
    """Return the proportional set size of *pid* and its children, in MB."""
    total = 0
    for process in [pid, *children(pid)]:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1024


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False).stdout
    direct = [int(word) for word in found.split()]
    return direct + [grandchild for child in direct for grandchild in children(child)]


def wait_for(condition: Callable[[], object], timeout_s: float) -> float:
    """Return how long it took until *condition* held, in seconds."""
    started_at = time.monotonic()
    while not condition():
        if time.monotonic() > started_at + timeout_s:
            raise TimeoutError(f"not within {timeout_s} s")
        time.sleep(0.001)
    return time.monotonic() - started_at


class Bench:
    def __init__(self, world: ServiceLab, folder: Path, rules: str) -> None:
        self.world = world
        self.folder = folder
        self.rules = rules
        self.log = folder / "log"
        self.file = folder / "services.yaml"

    def start(self) -> tuple[subprocess.Popen[bytes], float]:
        """Start the proxy; return it and how long it took until it was ready."""
        self.log.write_text("")
        command = [sys.executable, "-P", "-m", "userspace_proxy", "run", str(self.file), "--rules", self.rules]
        started_at = time.monotonic()
        proxy = self.world.node.start(*command, "--state-dir", str(self.folder / "state"), log=self.log)
        wait_for(lambda: "ready:" in self.log.read_text() or proxy.poll() is not None, 60)
        if proxy.poll() is not None:
            raise RuntimeError(self.log.read_text())
        return proxy, time.monotonic() - started_at

    def answer(self, number: int) -> str:
        try:
            return ask(self.world.client, service_ip(number), timeout_s=1.0)
        except OSError as error:
            return str(error)

    def change_to_traffic_s(self, services: int) -> float:
        """Return the median time from the file's replacement to the first answer of the new endpoint."""
        took = []
        for turn in range(_CHANGES):
            pod = (turn + 1) % 2
            temporary = self.file.with_suffix(".new")
            temporary.write_text(manifest(services, probe_pod=pod))
            temporary.replace(self.file)
            took.append(wait_for(lambda pod=pod: self.answer(services - 1) == f"pod{pod + 1}", 10))  # type: ignore[misc]
        return statistics.median(took)

    def scale(self, services: int) -> dict[str, float]:
        self.file.write_text(manifest(services, probe_pod=0))
        proxy, ready_s = self.start()
        wait_for(lambda: self.answer(services - 1) == "pod1", 10)
        change_s = self.change_to_traffic_s(services)
        result = {
            "services": services,
            "manifest_mb": round(self.file.stat().st_size / 1e6, 1),
            "ready_s": round(ready_s, 2),
            "change_to_traffic_ms": round(change_s * 1000, 1),
            "pss_mb": round(pss_mb(proxy.pid), 1),
        }
        started_at = time.monotonic()
        proxy.send_signal(signal.SIGTERM)
        proxy.wait(30)
        result["stop_s"] = round(time.monotonic() - started_at, 2)
        return result

    def restart(self, services: int) -> dict[str, float]:
        self.file.write_text(manifest(services, probe_pod=0))
        proxy, _ = self.start()
        proxy.kill()
        proxy.wait(5)
        proxy, ready_s = self.start()
        proxy.terminate()
        proxy.wait(10)
        return {"services": services, "ready_after_kill_9_s": round(ready_s, 2)}


def enter_namespaces(module: str) -> None:
    """Become *module* in namespaces of its own, unless it is there already."""
    if not os.environ.get(_INSIDE):
        command = command_in_namespaces([sys.executable, "-m", module, *sys.argv[1:]])
        os.execvpe(command[0], command, {**os.environ, _INSIDE: "1"})  # noqa: S606 - a list, no shell
    prepare()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--services", type=int, default=10_000)
    parser.add_argument("--rules", choices=["nftables", "iptables"], default="nftables")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    enter_namespaces("benchmarks.scale")
    with tempfile.TemporaryDirectory() as folder, Lab() as lab:
        world = build_service_lab(lab, pods=2)
        for pod in world.pods:
            start_nginx(pod, Path(folder))
        bench = Bench(world, Path(folder), arguments.rules)
        results = {"scale": bench.scale(arguments.services), "restart": bench.restart(100)}
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    for name, figures in results.items():
        print(f"{name} ({arguments.rules})")
        for figure, value in figures.items():
            print(f"  {figure:24} {value:>10}")


if __name__ == "__main__":
    main()
