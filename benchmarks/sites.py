"""The hosts of the comparison: one client, one pod, and for each plane a node of its own between them.

A node a plane means: a plane's connection tracking, its rules, its ports in TIME_WAIT and its addresses as
the backends see them meet no other plane's. The processes behind it all are the same for every plane.
"""

from __future__ import annotations

import shutil
import string
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.scale import children
from userspace_proxy.errors import StartError
from userspace_proxy.lab import Host, Lab, ask

SMALL, BULK, UDP, UDP_ONCE = 8080, 8081, 9053, 9054
BULK_BYTES = 64 * 1024 * 1024
PROBE_POD_IP = "10.244.0.2"
_PEERS = Path(__file__).parent / "peers"
_START_TIMEOUT_S = 20.0


@dataclass(eq=False)
class Site:
    """One plane's node, with what runs there."""

    name: str
    node: Host
    client: Host
    pod_ip: str
    node_ip: str
    service_ip: str
    folder: Path
    front_ip: str = ""  # the address that clients dial
    pids: Sequence[int] = ()  # of the plane's processes; none for what the kernel does
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def peer_file(self, name: str, **values: object) -> Path:
        """Fill in peers/*name* and return where the result lies."""
        return fill_in(name, self.folder / name, pod_ip=self.pod_ip, service_ip=self.service_ip, **values)

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a process of the plane."""
        process = self.node.start(*command, log=self.folder / "log")
        self.processes.append(process)
        return process

    def wait_until_it_serves(self) -> None:
        """Wait for the plane's first answer, then note its processes."""
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
                break
        self.pids = [pid for process in self.processes for pid in (process.pid, *children(process.pid))]

    def log(self) -> str:
        log = self.folder / "log"
        return log.read_text()[-2000:].strip() if log.exists() else ""

    def forget_connections(self) -> None:
        """Empty this node's connection tracking (its own, nobody else's), so that each run starts alike."""
        self.node.run("conntrack", "-F")


class Sites:
    """The client, the pod with its servers, and the nodes between them."""

    def __init__(self, lab: Lab, folder: Path, congestion: str) -> None:
        self.client = lab.add("client")
        self.pod = lab.add("pod")
        self._lab = lab
        self._folder = folder
        self._congestion = congestion
        self._count = 0
        for host in (self.client, self.pod):
            self._prepare_host(host)
        # One more address for the pod: the endpoint of the 10,000 Services that are loaded under load.
        self.pod.ip("address", "add", f"{PROBE_POD_IP}/32", "dev", "lo")

    def _prepare_host(self, host: Host) -> None:
        # What many short connections need: room in the backlog, and few of them kept in TIME_WAIT.
        knobs = ["net.core.somaxconn=4096", "net.ipv4.tcp_max_syn_backlog=4096", "net.ipv4.tcp_max_tw_buckets=16384"]
        if self._congestion:
            knobs.append(f"net.ipv4.tcp_congestion_control={self._congestion}")
        host.run("sysctl", "-qw", *knobs)

    def add(self, name: str) -> Site:
        """Make the node for the plane called *name*."""
        self._count += 1
        net = self._count
        node = self._lab.add(f"node{net}")
        self._prepare_host(node)
        node.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        client_ip, node_ip = f"10.{net}.1.2", f"10.{net}.1.1"
        pod_ip, pod_gateway = f"10.{net}.2.2", f"10.{net}.2.1"
        service_ip = f"10.96.{200 + net}.1"
        self._lab.link(self.client, f"node{net}", node, "client")
        self._lab.link(self.pod, f"node{net}", node, "pod")
        self.client.ip("address", "add", f"{client_ip}/24", "dev", f"node{net}")
        node.ip("address", "add", f"{node_ip}/24", "dev", "client")
        self.pod.ip("address", "add", f"{pod_ip}/24", "dev", f"node{net}")
        node.ip("address", "add", f"{pod_gateway}/24", "dev", "pod")
        self.client.ip("route", "add", f"{service_ip}/32", "via", node_ip)
        self.client.ip("route", "add", f"10.{net}.2.0/24", "via", node_ip)
        self.pod.ip("route", "add", f"10.{net}.1.0/24", "via", pod_gateway)
        node.ip("route", "add", f"{PROBE_POD_IP}/32", "via", pod_ip)
        folder = self._folder / name.replace(" ", "-")
        folder.mkdir()
        site = Site(name, node, self.client, pod_ip, node_ip, service_ip, folder)
        node.run("nft", "-f", str(site.peer_file("node.rules")))
        return site

    def start_backends(self) -> None:
        """Start two nginx, for small answers and for bulk, and a UDP echo, in the pod."""
        (self._folder / "bulk").write_bytes(bytes(range(256)) * (BULK_BYTES // 256))
        for name, port in (("small", SMALL), ("large", BULK)):
            config = fill_in("backend.conf", self._folder / f"{name}.conf", folder=self._folder, server=name, port=port)
            self.pod.start("nginx", "-p", str(self._folder), "-c", str(config), log=self._folder / "backends.log")
        echo = str(Path(__file__).parent / "echo.py")
        for port in (UDP, UDP_ONCE):
            self.pod.start(sys.executable, echo, str(port), log=self._folder / "backends.log")
        give_up_at = time.monotonic() + _START_TIMEOUT_S
        for port in (SMALL, BULK):
            while True:
                try:
                    ask(self.pod, "127.0.0.1", port, timeout_s=1.0)
                except OSError as error:
                    if time.monotonic() > give_up_at:
                        log = (self._folder / "backends.log").read_text().strip()
                        raise StartError(f"the backends do not answer: {log or error}") from None
                    time.sleep(0.01)
                else:
                    break


def fill_in(name: str, target: Path, **values: object) -> Path:
    """Write peers/*name* to *target* with its ``$name`` placeholders replaced; return *target*."""
    text = (_PEERS / name).read_text()
    # nginx has variables with a dollar as well: what is not ours stays.
    target.write_text(string.Template(text).safe_substitute({key: str(value) for key, value in values.items()}))
    return target


def load_stream_module() -> str:
    """Return the line with which nginx finds its stream module; empty where it is built in."""
    nginx = shutil.which("nginx") or "/usr/sbin/nginx"
    built = subprocess.run([nginx, "-V"], capture_output=True, text=True, timeout=10, check=True).stderr
    for word in built.split():
        option, _, value = word.partition("=")
        module = Path(value) / "ngx_stream_module.so"
        if option == "--modules-path" and module.exists():
            return f"load_module {module};"
    return ""
