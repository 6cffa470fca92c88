"""Virtual hosts on this machine: network namespaces with veth pairs between them.

Everything runs in the namespaces of one process tree (`command_in_namespaces`). When its first process ends, the kernel
removes everything. Where unprivileged user namespaces are allowed, no privileges are needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from userspace_proxy.errors import StartError

_INSIDE = "USERSPACE_PROXY_IN_NAMESPACES"  # a pipe that ends with the process outside
_CLONE_NEWNET = 0x40000000
_NETNS_FOLDER = Path("/run/netns")
_TOOL_TIMEOUT_S = 30

_libc = ctypes.CDLL(None, use_errno=True)


def command_in_namespaces(command: Sequence[str]) -> list[str]:
    """Return a command that runs *command* in its own network, mount and process namespaces.

    Raises:
        StartError: this machine forbids it to this user, or `unshare` is missing.
    """
    if shutil.which("unshare") is None:
        raise StartError("unshare is not installed; install the package util-linux")
    namespaces = ["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    ways = [["unshare", "--user", "--map-root-user", *namespaces]]
    if os.geteuid() == 0:
        ways.insert(0, ["unshare", *namespaces])
    errors = []
    for way in ways:
        tried = subprocess.run([*way, "true"], capture_output=True, text=True, timeout=_TOOL_TIMEOUT_S, check=False)
        if not tried.returncode:
            return [*way, *command]
        errors.append(tried.stderr.strip())
    advice = (
        "this root lacks the capabilities; run it outside of the chroot, or start the container with "
        "--cap-add SYS_ADMIN --cap-add NET_ADMIN --security-opt apparmor=unconfined"
        if os.geteuid() == 0
        else "run it as root, or allow them to users: sysctl kernel.unprivileged_userns_clone=1 "
        "user.max_user_namespaces=10000 (on Ubuntu also kernel.apparmor_restrict_unprivileged_userns=0)"
    )
    raise StartError(f"namespaces are forbidden here ({errors[0]}); {advice}")


def enter_namespaces(arguments: Sequence[str], tools: Mapping[str, str], module: str = "userspace_proxy") -> None:
    """Replace this process by ``python -m MODULE ARGUMENTS`` in new namespaces, unless it already runs in them.

    *tools* maps each required tool to its package. When the first process inside ends, the kernel ends all others.

    Raises:
        StartError: namespaces are forbidden here, or a tool is missing.
    """
    os.environ["PATH"] = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # a plain user's lacks them
    for tool, package in tools.items():
        if shutil.which(tool) is None:
            raise StartError(f"{tool} is not installed; install the package {package}")
    if os.environ.get(_INSIDE):
        return
    command = command_in_namespaces([sys.executable, "-P", "-m", module, *arguments])
    # Ctrl-C reaches the command inside, which cleans up and ends. `unshare` does not pass on SIGTERM. It dies, and the
    # kernel then ends all processes inside.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lifeline, _held = os.pipe()
    with subprocess.Popen(command, env={**os.environ, _INSIDE: str(lifeline)}, pass_fds=[lifeline]) as inside:
        signal.signal(signal.SIGTERM, lambda *_: inside.kill())
        code = inside.wait()
    sys.exit(code if code >= 0 else 128 - code)


def prepare() -> None:
    """Mount a private /run, where `ip netns` keeps names and iptables its lock. Call it once, inside the namespaces."""
    os.environ["PATH"] = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # a plain user's lacks them
    lifeline = os.environ.pop(_INSIDE, "")  # child commands enter their own namespaces
    if lifeline:
        threading.Thread(target=_end_with, args=(int(lifeline),), daemon=True).start()
    _check(_libc.mount(b"tmpfs", b"/run", b"tmpfs", 0, None), "mounting a private /run")
    _NETNS_FOLDER.mkdir()
    ip("link", "set", "lo", "up")


def _end_with(lifeline: int) -> None:
    """End this process, the first one of its namespaces, when the process outside is dead, even if it was killed."""
    os.read(lifeline, 1)
    os._exit(1)


def ip(*arguments: str) -> str:
    """Run ``ip`` in this thread's network namespace and return its output. Raises CalledProcessError."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=_TOOL_TIMEOUT_S, check=False)
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, done.args, done.stdout, done.stderr)
    return done.stdout


@contextlib.contextmanager
def inside(namespace: Path) -> Iterator[None]:
    """Create this thread's sockets in the network *namespace* during the block. Raises OSError."""
    with open("/proc/thread-self/ns/net") as here, open(namespace) as there:  # noqa: PTH123 - descriptors
        _setns(there.fileno())
        try:
            yield
        finally:
            _setns(here.fileno())


@dataclass(eq=False)
class Host:
    """One network namespace, which acts as a host of the lab."""

    name: str
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def ip(self, *arguments: str) -> str:
        """Run ``ip`` on this host."""
        return ip("-n", self.name, *arguments)

    def command(self, *command: str) -> list[str]:
        """Return the command line that runs *command* on this host."""
        return ["ip", "netns", "exec", self.name, *command]

    def run(
        self, *command: str, timeout_s: float = _TOOL_TIMEOUT_S, check: bool = True, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run *command* on this host and wait for its end."""
        return subprocess.run(
            self.command(*command), capture_output=True, text=True, timeout=timeout_s, check=check, input=stdin
        )

    def start(
        self, *command: str, log: Path | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start *command* on this host; it ends with the lab at the latest."""
        with contextlib.ExitStack() as stack:
            out = stack.enter_context(log.open("ab")) if log else subprocess.DEVNULL
            process = subprocess.Popen(
                self.command(*command),
                stdout=out,
                stderr=out,
                stdin=subprocess.DEVNULL,
                env=dict(env) if env else None,
                start_new_session=True,  # Ctrl-C at a terminal is for the program in front
            )
        self.processes.append(process)
        return process

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Create this thread's sockets on this host during the block; they stay there."""
        with inside(_NETNS_FOLDER / self.name):
            yield

    def add_addresses(self, device: str, *addresses: str, gateways: Sequence[str] = ()) -> None:
        """Give *device* the *addresses* with their subnets (/24 or /64), and this host default routes by *gateways*."""
        for address in addresses:
            length = ["64", "nodad"] if ":" in address else ["24"]
            self.ip("address", "add", f"{address}/{length[0]}", "dev", device, *length[1:])
        for gateway in gateways:
            self.ip("-6" if ":" in gateway else "-4", "route", "add", "default", "via", gateway)

    def set_knob(self, knob: str, value: object) -> None:
        """Set ``/proc/sys/net/KNOB`` of this host."""
        with self.inside():
            Path("/proc/sys/net", knob).write_text(f"{value}\n")

    def stop_all(self) -> None:
        """End all processes started on this host."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait(timeout=_TOOL_TIMEOUT_S)
        self.processes.clear()


def _setns(fd: int) -> None:
    _check(_libc.setns(fd, _CLONE_NEWNET), "entering a network namespace")


def _check(result: int, doing: str) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, f"{doing}: {os.strerror(code)}")


class Lab:
    """Hosts and links; a context manager that removes them at its end."""

    def __init__(self) -> None:
        self.hosts: dict[str, Host] = {}

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts.values():
            host.stop_all()
        for name in self.hosts:
            ip("netns", "del", name)
        self.hosts.clear()

    def add(self, name: str) -> Host:
        """Add a host that has only ``lo``."""
        ip("netns", "add", name)
        host = self.hosts[name] = Host(name)
        host.ip("link", "set", "lo", "up")
        # Duplicate address detection would keep IPv6 addresses unusable for two seconds.
        for knob in ("all", "default"):
            host.set_knob(f"ipv6/conf/{knob}/accept_dad", 0)
        # The kernel limits ICMP messages. A burst of refused datagrams would otherwise look unanswered.
        host.set_knob("ipv4/icmp_ratelimit", 0)
        host.set_knob("ipv6/icmp/ratelimit", 0)
        return host

    def remove(self, host: Host) -> None:
        """Remove *host* and its links; sockets that are open there keep its namespace."""
        host.stop_all()
        ip("netns", "del", host.name)
        del self.hosts[host.name]

    def link(self, left: Host, left_device: str, right: Host, right_device: str) -> None:
        """Connect two hosts with a veth pair; both ends are up and have no addresses."""
        left.ip("link", "add", left_device, "type", "veth", "peer", "name", right_device, "netns", right.name)
        left.ip("link", "set", left_device, "up")
        right.ip("link", "set", right_device, "up")

    def attach(self, pod: Host, node: Host, device: str) -> None:
        """Connect *pod* with the bridge of *node*, at a port named *device*."""
        self.link(pod, "eth0", node, device)
        node.ip("link", "set", device, "master", BRIDGE)
        # As CNI plugins do: with br_netfilter, a packet of a pod to itself leaves by the port at which it came.
        node.ip("link", "set", device, "type", "bridge_slave", "hairpin", "on")


@dataclass(frozen=True)
class ServiceLab:
    """The usual lab: a client next to a node, and pods on a bridge of the node.

    client 192.168.50.2, fd00:50::2  -  node 192.168.50.1, fd00:50::1; pods 10.244.0.2 ... and fd00:244::2 ...
    """

    lab: Lab
    client: Host
    node: Host
    pods: tuple[Host, ...]

    @staticmethod
    def pod_ip(index: int) -> str:
        return f"10.244.0.{index + 2}"

    @staticmethod
    def pod_ip6(index: int) -> str:
        return f"fd00:244::{index + 2}"


NODE_IP, NODE_IP6 = "192.168.50.1", "fd00:50::1"
CLIENT_IP, CLIENT_IP6 = "192.168.50.2", "fd00:50::2"
BRIDGE, GATEWAY, _GATEWAY6 = "cni0", "10.244.0.1", "fd00:244::1"
_BRIDGE_MAC = "0a:58:0a:f4:00:01"


def build_service_lab(lab: Lab, pods: int) -> ServiceLab:
    """Build a `ServiceLab` with *pods* pods in *lab*."""
    client, node = lab.add("client"), lab.add("node")
    lab.link(client, "eth0", node, "eth0")
    for knob in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        node.set_knob(knob, 1)  # as on cluster nodes; a namespace inherits the machine's value
    client.add_addresses("eth0", CLIENT_IP, CLIENT_IP6, gateways=(NODE_IP, NODE_IP6))
    node.add_addresses("eth0", NODE_IP, NODE_IP6)
    # As CNI plugins do: otherwise its address follows its ports. Pods then answer an address that is gone with a port.
    node.ip("link", "add", BRIDGE, "address", _BRIDGE_MAC, "type", "bridge")
    node.ip("link", "set", BRIDGE, "up")
    node.add_addresses(BRIDGE, GATEWAY, _GATEWAY6)
    hosts = []
    for index in range(pods):
        pod = lab.add(f"pod{index + 1}")
        lab.attach(pod, node, pod.name)
        pod.add_addresses("eth0", ServiceLab.pod_ip(index), ServiceLab.pod_ip6(index), gateways=(GATEWAY, _GATEWAY6))
        hosts.append(pod)
    return ServiceLab(lab, client, node, tuple(hosts))
