"""The `demo` command: shows what the proxy does for a client, a node and three nginx backends in private namespaces.

Its output fits a terminal of 80 columns and 24 lines. Where user namespaces are allowed, it needs no root. When the
command's first process ends, the kernel removes everything.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
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
from rich.table import Table

from userspace_proxy.errors import StartError
from userspace_proxy.lab import (
    Lab,
    ServiceLab,
    ask,
    build_service_lab,
    connect,
    enter_namespaces,
    prepare,
    service,
    start_nginx,
    start_proxy,
    wait_until,
)

WEB, STICKY, EMPTY = "10.96.0.10", "10.96.0.11", "10.96.0.12"
_KERNEL_MODE = "nftables"
_WIDTH = 80
_LOAD_S = 2.0
_CLIENTS = 4
_VICTIM = 1  # the pod whose server is killed
_RULE = re.compile(rf"{re.escape(WEB)} \. tcp \. 80 .*: \d+")  # the last number is a port of the proxy
_CHOICE = re.compile(r"\S+ -> \S+ -> \S+ \([^)]*\)")


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
    console = console if console.is_terminal else Console(quiet=as_json, highlight=False, width=_WIDTH)
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
        self._servers = [start_nginx(pod, folder) for pod in world.pods]
        self._results: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        self._show("client 192.168.50.2 - node 192.168.50.1 - three nginx pods 10.244.0.2 to .4")
        self._write_manifests()
        started_at = time.monotonic()
        proxy = self._start("userspace")
        self._results["ready_s"] = round(time.monotonic() - started_at, 3)
        self._show(f"$ userspace-proxy run manifests/    ready after {self._results['ready_s']:.2f} s")
        self._show_rule()
        self._show_round_robin()
        self._show_affinity()
        self._show_refusal()
        ours = self._kill_under_load("userspace")
        choice = self._last_failover()
        self._stop(proxy)
        theirs = self._kill_in_kernel_mode()
        self._show_failures(ours, theirs, choice)
        self._show("\nTry next: rules explained, all modes measured, a failover of your own", "bold cyan")
        command = _command()
        self._show(f"  {command} render examples/cluster-ip --explain")
        self._show(f"  {command} compare --quick --html report.html")
        self._show("  less docs/tutorial/first-failover.md")
        if ours.errors:
            raise StartError(f"{len(ours.errors)} requests failed in userspace mode, the first with: {ours.errors[0]}")
        return self._results

    def _show(self, text: str, style: str = "") -> None:
        self._console.print(text, style=style, soft_wrap=True, markup=False)

    def _write_manifests(self) -> None:
        pods = [ServiceLab.pod_ip(index) for index in range(3)]
        (self._folder / "web.yaml").write_text(
            service("web", WEB, pods)
            + service("sticky", STICKY, pods, options="sessionAffinity: ClientIP")
            + service("empty", EMPTY, [])
        )

    def _start(self, mode: str) -> subprocess.Popen[bytes]:
        arguments = ("--proxy-mode", mode, "--access-log", str(self._folder / "access"))
        return start_proxy(self._world.node, self._folder / "web.yaml", self._folder / mode, *arguments)

    # ---- one Service after the other

    def _show_rule(self) -> None:
        listed = self._world.node.run("nft", "list", "map", "inet", "userspace_proxy", "service_ips4").stdout
        rule = _RULE.search(listed)
        self._show(f"{'rule':12} {rule[0] if rule else 'missing'}")

    def _show_round_robin(self) -> None:
        seen = self._results["round_robin"] = [ask(self._world.client, WEB) for _ in range(9)]
        self._show(f"{'round robin':12} {' '.join(seen)}")

    def _show_affinity(self) -> None:
        hosts = (self._world.client, self._world.pods[0])
        seen = self._results["affinity"] = {host.name: [ask(host, STICKY) for _ in range(4)] for host in hosts}
        each = "; ".join(f"from {name}: {' '.join(answers)}" for name, answers in seen.items())
        self._show(f"{'affinity':12} {each}")

    def _show_refusal(self) -> None:
        started_at = time.monotonic()
        try:
            connect(self._world.client, EMPTY, 80).close()
            outcome = "connected"
        except OSError as error:
            outcome = (error.strerror or str(error)).lower()
        took_ms = (time.monotonic() - started_at) * 1000
        self._results["no_endpoints"] = outcome
        self._show(f"{'no endpoints':12} {outcome} after {took_ms:.1f} ms")

    # ---- a backend dies

    def _kill_under_load(self, mode: str) -> _Load:
        load = _Load(self._world)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[done]} requests"))
        with Progress(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal
        ) as progress:
            bar = progress.add_task(f"{mode} mode: pod2 is killed half-way", total=_LOAD_S, done=0)
            started_at = time.monotonic()
            load.start()
            while (elapsed_s := time.monotonic() - started_at) < _LOAD_S:
                if elapsed_s > _LOAD_S / 2 and self._servers[_VICTIM].poll() is None:
                    load.kill(self._servers[_VICTIM])
                progress.update(bar, completed=elapsed_s, done=load.done)
                time.sleep(0.05)
            load.stop()
        return load

    def _last_failover(self) -> str:
        """Return the choice of a failover as in the access log; a thread of the proxy writes the log."""

        def found() -> list[str]:
            return [line for line in (self._folder / "access").read_text().splitlines() if "(failover)" in line]

        wait_until(found, "the access log names no failover", timeout_s=5)
        choice = _CHOICE.search(found()[-1])
        return choice[0] if choice else ""

    def _kill_in_kernel_mode(self) -> _Load:
        self._servers[_VICTIM] = start_nginx(self._world.pods[_VICTIM], self._folder)
        proxy = self._start(_KERNEL_MODE)
        load = self._kill_under_load(_KERNEL_MODE)
        proxy.send_signal(signal.SIGINT)
        proxy.wait(15)
        return load

    def _show_failures(self, ours: _Load, theirs: _Load, choice: str) -> None:
        self._show(f"\n{_CLIENTS} clients, a new connection for each request; pod2 is killed half-way", "bold cyan")
        table = Table("mode", *(pod.name for pod in self._world.pods), "failed after it", box=None, header_style="bold")
        for column in table.columns[1:]:
            column.justify = "right"
        for mode, load in (("userspace", ours), (_KERNEL_MODE, theirs)):
            answers = (f"{load.answers[pod.name]:,}" for pod in self._world.pods)
            style = "bold red" if load.errors else "bold green"
            table.add_row(mode, *answers, f"{len(load.errors):,} ({load.failed_share:.0%})", style=style)
        self._console.print(table)
        self._show(f"In userspace mode the proxy dials another pod. The access log says so:\n  {choice}")
        self._show(f"In {_KERNEL_MODE} mode the kernel uses the dead pod until the endpoint is removed.")
        self._results["failover"] = {"answers": dict(ours.answers), "failed": len(ours.errors)}
        self._results["kernel_mode"] = {
            "mode": _KERNEL_MODE,
            "answers": dict(theirs.answers),
            "failed": len(theirs.errors),
            "failed_share": round(theirs.failed_share, 3),
        }

    def _stop(self, proxy: subprocess.Popen[bytes]) -> None:
        proxy.send_signal(signal.SIGTERM)
        code = proxy.wait(15)
        left = self._world.node.run("nft", "list", "ruleset").stdout.strip()
        self._results["stop"] = {"exit_code": code, "rules_left": bool(left)}
        self._show(f"{'SIGTERM':12} exit code {code}; nftables rules left: {left or 'none'}")


def _command() -> str:
    """Return the command as a user of this checkout types it."""
    command = Path(sys.executable).with_name("userspace-proxy")
    return os.path.relpath(command) if command.is_relative_to(Path.cwd()) else "userspace-proxy"


class _Load:
    """Clients that send requests until they are stopped. ``errors``: those after the server was killed."""

    def __init__(self, world: ServiceLab) -> None:
        self._client = world.client
        self._stopped = threading.Event()
        self._asking = [threading.Lock() for _ in range(_CLIENTS)]
        self._threads = [threading.Thread(target=self._ask_on, args=(lock,), daemon=True) for lock in self._asking]
        self._done_before = 0
        self.answers: Counter[str] = Counter()
        self.errors: list[OSError] = []

    @property
    def done(self) -> int:
        return self.answers.total() + len(self.errors)

    @property
    def failed_share(self) -> float:
        """The share of the requests after the server was killed that failed."""
        return len(self.errors) / max(1, self.done - self._done_before)

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(10)

    def kill(self, server: subprocess.Popen[bytes]) -> None:
        """Kill *server* while it holds no request: a request that a dying process has accepted is lost in any mode."""
        with self._between_requests():
            self._done_before = self.done
            server.kill()
            server.wait(5)

    @contextlib.contextmanager
    def _between_requests(self) -> Iterator[None]:
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
