"""The `demo` command: shows what the proxy does for a client, a node and three nginx backends in private namespaces.

Where user namespaces are allowed, it needs no root. When the command's first process ends, the kernel removes
everything.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.syntax import Syntax
from rich.table import Table

from userspace_proxy.errors import StartError
from userspace_proxy.lab import Lab, ServiceLab, ask, build_service_lab, connect, enter_namespaces, prepare, start_nginx

WEB, STICKY, EMPTY = "10.96.0.10", "10.96.0.11", "10.96.0.12"
_LOAD_S = 4.0
_CLIENTS = 4

_SLICE = """\
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}-1, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: IPv4
ports: [{{port: 8080}}]
endpoints: [{endpoints}]
"""
_SERVICE = """\
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec:
  clusterIP: {ip}
  ports: [{{port: 80}}]{extra}
"""


def enter(arguments: list[str]) -> None:
    """Replace this process by the demo in new namespaces, unless it already runs in them.

    Raises:
        StartError: namespaces are forbidden here, or a tool is missing.
    """
    enter_namespaces(["demo", *arguments], {"nft": "nftables", "ip": "iproute2", "nginx": "nginx-light"})


def run(*, as_json: bool) -> None:
    """Run the whole demo. Raises StartError if a part of it does not start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    prepare()
    console = Console(stderr=as_json, quiet=as_json, highlight=False)
    try:
        with tempfile.TemporaryDirectory(dir="/run") as folder, Lab() as lab:
            results = _Demo(console, build_service_lab(lab, pods=3), Path(folder)).run()
    except subprocess.CalledProcessError as error:
        words = (error.stderr or error.stdout or "").strip() or f"exit code {error.returncode}"
        raise StartError(f"{' '.join(error.cmd)}: {words}") from None
    except KeyboardInterrupt:
        raise StartError("stopped") from None
    if as_json:
        print(json.dumps(results, indent=2))  # noqa: T201 - this is the output


class _Demo:
    def __init__(self, console: Console, world: ServiceLab, folder: Path) -> None:
        self._console = console
        self._world = world
        self._folder = folder
        self._manifests = folder / "manifests"
        self._log = folder / "log"
        self._results: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        self._say(
            "A client, a node, and three nginx pods behind it",
            "client 192.168.50.2 -- node 192.168.50.1 -- pod1 10.244.0.2, pod2 10.244.0.3, pod3 10.244.0.4",
        )
        servers = [start_nginx(pod, self._folder) for pod in self._world.pods]
        self._write_manifests()
        proxy = self._start_proxy()
        self._show_rules()
        self._show_round_robin()
        self._show_affinity()
        self._show_failover(servers)
        self._show_refusal()
        self._show_stop(proxy)
        return self._results

    def _say(self, title: str, text: str = "") -> None:
        self._console.print()
        self._console.print(title, style="bold cyan", soft_wrap=True)
        if text:
            self._console.print(text, style="dim", soft_wrap=True)

    # ---- set-up

    def _write_manifests(self) -> None:
        self._manifests.mkdir()
        pods = ", ".join(f"{{addresses: [{ServiceLab.pod_ip(index)}]}}" for index in range(3))
        affinity = "\n  sessionAffinity: ClientIP"
        for name, ip, extra, endpoints in (
            ("web", WEB, "", pods),
            ("sticky", STICKY, affinity, pods),
            ("empty", EMPTY, "", ""),
        ):
            manifest = (
                _SERVICE.format(name=name, ip=ip, extra=extra) + "---\n" + _SLICE.format(name=name, endpoints=endpoints)
            )
            (self._manifests / f"{name}.yaml").write_text(manifest)
        self._say("The manifest of web", "sticky is the same with sessionAffinity: ClientIP; empty has no endpoints")
        self._show_code((self._manifests / "web.yaml").read_text(), "yaml")

    def _start_proxy(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-m", "userspace_proxy", "run", str(self._manifests)]
        arguments = ["--state-dir", str(self._folder / "state"), "--access-log", str(self._folder / "access")]
        started_at = time.monotonic()
        proxy = self._world.node.start(*command, *arguments, log=self._log)
        while "ready:" not in self._log.read_text():
            if proxy.poll() is not None or time.monotonic() > started_at + 10:
                raise StartError(f"the proxy did not start: {self._log.read_text().strip()}")
            time.sleep(0.01)
        self._results["ready_s"] = round(time.monotonic() - started_at, 3)
        self._say(
            f"$ userspace-proxy run manifests/        (ready after {self._results['ready_s']:.2f} s)",
            "On the node; it needs CAP_NET_ADMIN and nothing else.",
        )
        return proxy

    # ---- demonstrations

    def _show_rules(self) -> None:
        listed = self._world.node.run("nft", "list", "map", "inet", "userspace_proxy", "service_ips4").stdout
        chain = self._world.node.run("nft", "list", "chain", "inet", "userspace_proxy", "services4").stdout
        rule = next(line.strip() for line in chain.splitlines() if "map @service_ips4" in line)
        self._say("The rules: one lookup leads each cluster IP to the proxy port of its Service")
        self._show_code(f"{rule}\n{listed}", "text")

    def _show_round_robin(self) -> None:
        seen = [ask(self._world.client, WEB) for _ in range(9)]
        self._results["round_robin"] = seen
        self._say(
            "Round robin: nine requests from the client",
            "$ for i in 1 2 3 4 5 6 7 8 9; do curl http://10.96.0.10; done",
        )
        self._console.print("  ".join(seen))
        line = self._last_line_of_the_access_log(len(seen))
        self._console.print(f"The access log says why: {line}", style="dim", soft_wrap=True)

    def _last_line_of_the_access_log(self, expected: int) -> str:
        """Return the last line once *expected* lines exist; a thread of the proxy writes them."""
        give_up_at = time.monotonic() + 2
        while len(lines := (self._folder / "access").read_text().splitlines()) < expected:
            if time.monotonic() > give_up_at:
                raise StartError("the access log stays empty")
            time.sleep(0.01)
        return lines[-1]

    def _show_affinity(self) -> None:
        seen = {host.name: [ask(host, STICKY) for _ in range(4)] for host in (self._world.client, self._world.pods[0])}
        self._results["affinity"] = seen
        self._say("Affinity: each client stays where it was put", "$ curl http://10.96.0.11      (4 times each)")
        for name, answers in seen.items():
            self._console.print(f"{name:8} {'  '.join(answers)}")

    def _show_failover(self, servers: list[subprocess.Popen[bytes]]) -> None:
        self._say(
            "A backend is killed under load",
            f"{_CLIENTS} clients, a new connection for each request; half-way pod2's nginx is killed with -9.\n"
            "At a moment when it holds no request: a request that a dying process has accepted is lost.",
        )
        load = _Load(self._world)
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[done]} requests"),
            console=self._console,
        ) as progress:
            bar = progress.add_task("load", total=_LOAD_S, done=0)
            started_at = time.monotonic()
            killed = False
            load.start()
            while (elapsed_s := time.monotonic() - started_at) < _LOAD_S:
                if not killed and elapsed_s > _LOAD_S / 2:
                    with load.between_requests():
                        servers[1].kill()
                        servers[1].wait(5)
                    killed = True
                progress.update(bar, completed=elapsed_s, done=load.done)
                time.sleep(0.05)
            load.stop()
            progress.update(bar, completed=_LOAD_S, done=load.done)
        table = Table("answered by", "requests", box=None, header_style="bold")
        for name, count in sorted(load.answers.items()):
            table.add_row(name, str(count))
        table.add_row("failed", str(len(load.errors)), style="bold green" if not load.errors else "bold red")
        self._console.print(table)
        said = next((line for line in self._log.read_text().splitlines() if "is ejected" in line), "")
        self._console.print(f"The proxy's log: {said}", style="dim", soft_wrap=True)
        self._results["failover"] = {"answers": dict(load.answers), "failed": len(load.errors)}
        if load.errors:
            raise StartError(f"{len(load.errors)} requests failed, the first with: {load.errors[0]}")

    def _show_refusal(self) -> None:
        self._say("No endpoints: refused at once, never accepted and dropped", f"$ curl http://{EMPTY}")
        started_at = time.monotonic()
        try:
            connect(self._world.client, EMPTY, 80).close()
            outcome = "connected"
        except OSError as error:
            outcome = (error.strerror or str(error)).lower()
        took_ms = (time.monotonic() - started_at) * 1000
        self._results["no_endpoints"] = outcome
        self._console.print(f"{outcome}, after {took_ms:.1f} ms")

    def _show_stop(self, proxy: subprocess.Popen[bytes]) -> None:
        proxy.send_signal(signal.SIGTERM)
        code = proxy.wait(15)
        left = self._world.node.run("nft", "list", "ruleset").stdout + self._world.node.ip(
            "route", "show", "proto", "107"
        )
        self._results["stop"] = {"exit_code": code, "rules_left": bool(left.strip())}
        self._say("SIGTERM: rules away, listeners closed, connections drained")
        self._console.print(f"exit code {code}; rules and routes left behind: {left.strip() or 'none'}")
        self._console.print()
        self._console.print("All of it happened in private namespaces; they end with this command.", style="dim")

    def _show_code(self, text: str, language: str) -> None:
        if self._console.is_terminal:
            self._console.print(Syntax(text.rstrip(), language, theme="ansi_dark", background_color="default"))
        else:
            self._console.print(text.rstrip(), soft_wrap=True, markup=False)


class _Load:
    """Clients that send requests until they are stopped."""

    def __init__(self, world: ServiceLab) -> None:
        self._client = world.client
        self._stopped = threading.Event()
        self._asking = [threading.Lock() for _ in range(_CLIENTS)]
        self._threads = [threading.Thread(target=self._ask_on, args=(lock,), daemon=True) for lock in self._asking]
        self.answers: Counter[str] = Counter()
        self.errors: list[OSError] = []

    @property
    def done(self) -> int:
        return self.answers.total() + len(self.errors)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(10)

    @contextlib.contextmanager
    def between_requests(self) -> Iterator[None]:
        """Pause every client between two requests."""
        with contextlib.ExitStack() as stack:
            for lock in self._asking:
                stack.enter_context(lock)
            yield

    def _ask_on(self, asking: threading.Lock) -> None:
        while not self._stopped.is_set():
            with asking:
                try:
                    self.answers[ask(self._client, WEB)] += 1
                except OSError as error:
                    self.errors.append(error)
            time.sleep(0)  # locks are not fair: yield to a waiting thread
