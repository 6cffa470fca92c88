"""The hosts of a comparison: one client, the pods, and one node for each mode between them.

Separate nodes keep the modes apart: conntrack, rules, ports in TIME_WAIT, and the source addresses that backends see.
All modes share the same pods.
"""

import contextlib
import os
import shutil
import signal
import string
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from userspace_proxy.compare.meters import children
from userspace_proxy.lab import Host, Lab, ask, connect, ip, start_nginx, wait_until

SMALL, BULK = 8080, 8081
PEERS = Path(__file__).parent / "peers"
PODS = 3
_KILL_TIMEOUT_S = 10.0


@dataclass(eq=False)
class ModeNode:
    """The node of one mode, and the mode's processes.

    ``host``: its network namespace. ``front_ip``: the address that clients dial. ``pod_ip``: the load pod, seen from
    this node. ``pod_ips``: more pods, which may fail.
    """

    name: str
    host: Host
    client: Host
    net: int
    folder: Path
    pods: int = PODS
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
    def pod_ips(self) -> tuple[str, ...]:
        return tuple(f"10.{self.net}.{3 + index}.2" for index in range(self.pods))

    def service_ip(self, number: int = 0) -> str:
        """Return the cluster IP of Service *number*: 0 is for loads, 2 for disasters."""
        return f"10.{100 + self.net}.{number // 250}.{number % 250 + 1}"

    @property
    def service_range(self) -> str:
        """The range of this node's cluster IPs."""
        return f"10.{100 + self.net}.0.0/16"

    @property
    def pids(self) -> list[int]:
        """The mode's current processes; none for modes that run in the kernel alone."""
        return [pid for process in self.processes for pid in (process.pid, *children(process.pid))]

    def fill_in(self, template: Path, target: Path | None = None, **values: object) -> Path:
        """Fill in *template* with this node's addresses; return the path of the result."""
        addresses = {"pod_ip": self.pod_ip, "service_ip": self.service_ip()}
        return fill_in(template, target or self.folder / template.name, **addresses, **values)

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Start a process of the mode."""
        process = self.host.start(*command, log=self.folder / "log")
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

        def has_ended() -> bool:
            pids = ip("netns", "pids", self.host.name).split()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            return not pids

        wait_until(has_ended, f"processes of {self.name} do not end", timeout_s=_KILL_TIMEOUT_S)
        for process in self.processes:
            process.poll()
        self.processes.clear()

    def wait_until_it_serves(self) -> None:
        """Wait for the mode's first answer. Raises StartError with its log if none comes."""
        process = self.processes[0] if self.processes else None
        log = self.folder / "log"
        wait_until(
            lambda: ask(self.client, self.front_ip, SMALL, timeout_s=1.0),
            f"{self.name} does not serve",
            process=process,
            log=log,
        )

    def track_connections(self) -> None:
        """Turn connection tracking on, as on each node of a cluster."""
        self.host.run("nft", "-f", str(self.fill_in(PEERS / "node.rules")))

    def forget_connections(self) -> None:
        """Clear this node's conntrack table (no other node's), so that each run starts alike."""
        self.host.run("conntrack", "-F")


class CompareLab:
    """The client, the pods with their servers, and the nodes between them. *pods*: how many may fail."""

    def __init__(self, lab: Lab, folder: Path, congestion: str = "", pods: int = PODS) -> None:
        self.client = lab.add("client")
        self.pod = lab.add("pod")
        self.pods = tuple(lab.add(f"pod{index + 1}") for index in range(pods))
        self._lab = lab
        self.folder = folder
        self._congestion = congestion
        self._count = 0
        for host in (self.client, self.pod, *self.pods):
            self._prepare_host(host)

    def _prepare_host(self, host: Host) -> None:
        # Settings for many short connections: long queues, and few connections in TIME_WAIT.
        knobs = ["net.core.somaxconn=4096", "net.ipv4.tcp_max_syn_backlog=4096", "net.ipv4.tcp_max_tw_buckets=16384"]
        if self._congestion:
            knobs.append(f"net.ipv4.tcp_congestion_control={self._congestion}")
        host.run("sysctl", "-qw", *knobs)

    def add(self, name: str) -> ModeNode:
        """Add the node for the mode called *name*."""
        self._count += 1
        net = self._count
        host = self._lab.add(f"node{net}")
        self._prepare_host(host)
        host.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        folder = self.folder / name.replace(" ", "-")
        folder.mkdir()
        node = ModeNode(name, host, self.client, net, folder, len(self.pods))
        self._lab.link(self.client, host.name, host, "client")
        self.client.add_addresses(host.name, node.client_ip)
        host.add_addresses("client", node.node_ip)
        self.client.ip("route", "add", node.service_range, "via", node.node_ip)
        host.ip("route", "add", "default", "via", node.client_ip)
        for index, pod in enumerate((self.pod, *self.pods)):
            subnet, device = f"10.{net}.{2 + index}", f"pod{index}"
            self._lab.link(pod, host.name, host, device)
            pod.add_addresses(host.name, f"{subnet}.2")
            host.add_addresses(device, f"{subnet}.1")
            pod.ip("route", "add", f"10.{net}.1.0/24", "via", f"{subnet}.1")
            self.client.ip("route", "add", f"{subnet}.0/24", "via", node.node_ip)
        node.track_connections()
        return node

    def start_backends(self) -> None:
        """Start the pod's servers: nginx for small answers, iperf3 for bytes."""
        self.start_nginx("small", SMALL)
        iperf3 = ("env", f"TMPDIR={self.folder}", "iperf3", "-s", "-p", str(BULK))
        self._start_backend(BULK, lambda: connect(self.pod, "127.0.0.1", BULK), *iperf3)

    def start_nginx(self, name: str, port: int) -> None:
        """Start an nginx server in the pod: it serves small answers, and all files of the hosts' folder."""
        target = self.folder / f"{name}.conf"
        config = fill_in(PEERS / "backend.conf", target, folder=self.folder, server=name, port=port)
        command = ("nginx", "-p", str(self.folder), "-c", str(config))
        self._start_backend(port, lambda: ask(self.pod, "127.0.0.1", port, timeout_s=1.0), *command)

    def _start_backend(self, port: int, is_up: Callable[[], object], *command: str) -> None:
        log = self.folder / "backends.log"
        self.pod.start(*command, log=log)
        wait_until(is_up, f"the backend at port {port} does not answer", log=log)

    def start_endpoints(self) -> None:
        """Start a server in each of three pods, for Services with many endpoints."""
        for pod in self.pods[:PODS]:
            start_nginx(pod, self.folder)


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
