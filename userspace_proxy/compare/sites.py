"""The hosts of a comparison: one client, the pods, and one node for each mode between them.

Separate nodes keep the modes apart: conntrack, rules, ports in TIME_WAIT, and the source addresses that backends see.
All modes share the same pods.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import string
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from userspace_proxy.compare.meters import children
from userspace_proxy.errors import StartError
from userspace_proxy.lab import Host, Lab, ask, connect, ip, start_nginx

SMALL, BULK, TRIO = 8080, 8081, 8090
PEERS = Path(__file__).parent / "peers"
TRIO_PODS = 3
_START_TIMEOUT_S = 20.0
_KILL_TIMEOUT_S = 10.0
# Errors that affect one mode only: it gets a note, and the others are measured.
MISHAPS = (StartError, OSError, subprocess.SubprocessError)


def reason_of(error: Exception) -> str:
    """Return the reason for *error*; for a failed tool, the tool's own message."""
    if not isinstance(error, subprocess.CalledProcessError):
        return str(error)
    words = (error.stderr or error.stdout or "").strip() or f"exit code {error.returncode}"
    return f"{' '.join(map(str, error.cmd))}: {words}"


@dataclass(eq=False)
class Site:
    """One mode's node and its processes.

    ``pod_ip``: the address of the load pod from this node. ``trio_ips``: three more pods, one of which will fail.
    ``front_ip``: the address that clients dial. ``processes``: the processes of the mode.
    """

    name: str
    node: Host
    client: Host
    net: int
    folder: Path
    front_ip: str = ""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def client_ip(self) -> str:
        return f"10.{self.net}.1.2"

    @property
    def node_ip(self) -> str:
        return f"10.{self.net}.1.1"

    @property
    def pod_ip(self) -> str:
        return f"10.{self.net}.2.2"

    @property
    def trio_ips(self) -> tuple[str, ...]:
        return tuple(f"10.{self.net}.{3 + index}.2" for index in range(TRIO_PODS))

    def service_ip(self, number: int = 0) -> str:
        """Return the cluster IP of Service *number*: 0 is for loads, 1 for the three pods."""
        return f"10.{100 + self.net}.{number // 250}.{number % 250 + 1}"

    @property
    def service_range(self) -> str:
        """The range of this site's cluster IPs."""
        return f"10.{100 + self.net}.0.0/16"

    @property
    def pids(self) -> list[int]:
        """The mode's current processes; none for modes that run in the kernel alone."""
        return [pid for process in self.processes for pid in (process.pid, *children(process.pid))]

    def fill_in(self, template: Path, target: Path | None = None, **values: object) -> Path:
        """Fill in *template* with this site's addresses; return the path of the result."""
        trio = {f"trio{index}_ip": ip for index, ip in enumerate(self.trio_ips)}
        addresses = {"pod_ip": self.pod_ip, "service_ip": self.service_ip(), "trio_ip": self.service_ip(1), **trio}
        return fill_in(template, target or self.folder / template.name, **addresses, **values)

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a process of the mode."""
        process = self.node.start(*command, log=self.folder / "log")
        self.processes.append(process)
        return process

    def stop(self, timeout_s: float = 30.0) -> None:
        """Stop the mode's processes with SIGTERM, as a user would."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait(timeout_s)
        self.processes.clear()

    def kill(self) -> None:
        """Kill all processes on the mode's node, including workers that outlive their parent."""
        give_up_at = time.monotonic() + _KILL_TIMEOUT_S
        while (pids := ip("netns", "pids", self.node.name).split()) and time.monotonic() < give_up_at:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.01)
        for process in self.processes:
            process.poll()
        self.processes.clear()

    def wait_until_it_serves(self) -> None:
        """Wait for the mode's first answer. Raises StartError with its log if none comes."""
        give_up_at = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                ask(self.client, self.front_ip, SMALL, timeout_s=1.0)
            except OSError as error:
                ended = any(process.poll() is not None for process in self.processes)
                if ended or time.monotonic() > give_up_at:
                    raise StartError(f"{self.name} does not serve ({error}): {self.log()}") from None
                time.sleep(0.02)
            else:
                return

    def log(self) -> str:
        log = self.folder / "log"
        return log.read_text()[-2000:].strip() if log.exists() else ""

    def forget_connections(self) -> None:
        """Clear this node's conntrack table (no other node's), so that each run starts alike."""
        self.node.run("conntrack", "-F")


class Sites:
    """The client, the pods with their servers, and the nodes between them."""

    def __init__(self, lab: Lab, folder: Path, congestion: str = "") -> None:
        self.client = lab.add("client")
        self.pod = lab.add("pod")
        self.trio = tuple(lab.add(f"pod{index + 1}") for index in range(TRIO_PODS))
        self.trio_servers: list[subprocess.Popen[bytes]] = []
        self._lab = lab
        self._folder = folder
        self._congestion = congestion
        self._count = 0
        for host in (self.client, self.pod, *self.trio):
            self._prepare_host(host)

    def _prepare_host(self, host: Host) -> None:
        # Settings for many short connections: long queues, and few connections in TIME_WAIT.
        knobs = ["net.core.somaxconn=4096", "net.ipv4.tcp_max_syn_backlog=4096", "net.ipv4.tcp_max_tw_buckets=16384"]
        if self._congestion:
            knobs.append(f"net.ipv4.tcp_congestion_control={self._congestion}")
        host.run("sysctl", "-qw", *knobs)

    def add(self, name: str) -> Site:
        """Add the node for the mode called *name*."""
        self._count += 1
        net = self._count
        node = self._lab.add(f"node{net}")
        self._prepare_host(node)
        node.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        folder = self._folder / name.replace(" ", "-")
        folder.mkdir()
        site = Site(name, node, self.client, net, folder)
        self._lab.link(self.client, f"node{net}", node, "client")
        self.client.ip("address", "add", f"{site.client_ip}/24", "dev", f"node{net}")
        node.ip("address", "add", f"{site.node_ip}/24", "dev", "client")
        self.client.ip("route", "add", f"10.{100 + net}.0.0/16", "via", site.node_ip)
        for index, pod in enumerate((self.pod, *self.trio)):
            subnet, device = f"10.{net}.{2 + index}", f"pod{index}"
            self._lab.link(pod, f"node{net}", node, device)
            pod.ip("address", "add", f"{subnet}.2/24", "dev", f"node{net}")
            node.ip("address", "add", f"{subnet}.1/24", "dev", device)
            pod.ip("route", "add", f"10.{net}.1.0/24", "via", f"{subnet}.1")
            self.client.ip("route", "add", f"{subnet}.0/24", "via", site.node_ip)
        node.run("nft", "-f", str(site.fill_in(PEERS / "node.rules")))
        return site

    def start_backends(self) -> None:
        """Start the pod's servers: nginx for small answers, iperf3 for bytes."""
        self.start_nginx("small", SMALL)
        iperf3 = ("env", f"TMPDIR={self._folder}", "iperf3", "-s", "-p", str(BULK))
        self.pod.start(*iperf3, log=self._folder / "backends.log")
        self._wait_for_pod(BULK, lambda: connect(self.pod, "127.0.0.1", BULK).close())

    def start_nginx(self, name: str, port: int) -> None:
        """Start an nginx server in the pod: it serves small answers, and all files of the hosts' folder."""
        target = self._folder / f"{name}.conf"
        config = fill_in(PEERS / "backend.conf", target, folder=self._folder, server=name, port=port)
        self.pod.start("nginx", "-p", str(self._folder), "-c", str(config), log=self._folder / "backends.log")
        self._wait_for_pod(port, lambda: ask(self.pod, "127.0.0.1", port, timeout_s=1.0))

    def _wait_for_pod(self, port: int, try_it: Callable[[], object]) -> None:
        give_up_at = time.monotonic() + _START_TIMEOUT_S
        while True:
            try:
                try_it()
            except OSError as error:
                if time.monotonic() > give_up_at:
                    log = (self._folder / "backends.log").read_text().strip()
                    raise StartError(f"the backend at port {port} does not answer: {log or error}") from None
                time.sleep(0.01)
            else:
                return

    def start_trio(self) -> None:
        """Start a server in each of the three pods, one of which will fail."""
        self.trio_servers = [start_nginx(pod, self._folder) for pod in self.trio]

    def restart_trio(self, index: int) -> None:
        """Restart the server of one of the three pods, if it has ended."""
        if self.trio_servers[index].poll() is not None:
            self.trio_servers[index] = start_nginx(self.trio[index], self._folder)


def fill_in(template: Path, target: Path, **values: object) -> Path:
    """Write *template* to *target* with its ``$name`` placeholders replaced; return *target*."""
    # nginx also uses variables with a dollar: leave unknown names unchanged.
    text = string.Template(template.read_text()).safe_substitute({key: str(value) for key, value in values.items()})
    temporary = target.with_name(f".{target.name}.new")  # a watcher of the folder sees the whole file or none
    temporary.write_text(text)
    temporary.replace(target)
    return target


def load_stream_module() -> str | None:
    """Return the nginx directive that loads its stream module, "" if it is built in, or None if there is none."""
    nginx = shutil.which("nginx")
    if nginx is None:
        return None
    built = subprocess.run([nginx, "-V"], capture_output=True, text=True, timeout=10, check=True).stderr
    for word in built.split():
        option, _, value = word.partition("=")
        module = Path(value) / "ngx_stream_module.so"
        if option == "--modules-path" and module.exists():
            return f"load_module {module};"
    return "" if "--with-stream " in f"{built} " else None
