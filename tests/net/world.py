"""Shared parts of tests with packets: the lab with real servers in its pods, a proxy, and clients."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from userspace_proxy.lab import HTTP_PORT, Host, ServiceLab, ask, connect
from userspace_proxy.runtime.cleanup import remove_all

BACKEND = Path(__file__).with_name("backend.py")
UDP_PORT = 5353
# What a machine takes longer for than those that the bounds of these tests were made on, such as an emulated one.
PATIENCE = float(os.environ.get("TESTS_PATIENCE", "1"))
POD1, POD2 = ServiceLab.pod_ip(0), ServiceLab.pod_ip(1)
_REQUEST_PAUSE_S = 0.001
# Says "hello" and holds the connection until the client closes it.
_HOLDER = """
import socket
with socket.create_server(("", 9000)) as server:
    while True:
        sock, _ = server.accept()
        with sock:
            sock.sendall(b"hello")
            sock.recv(1)
"""


# Above the ports that the kernel chooses, and those of the proxy.
_UDP_PORTS = itertools.cycle(range(61_000, 65_536))


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 20.0) -> None:
    """Wait for *condition*; fail with *what*. The bound is generous, because only benchmarks measure speed.

    Looking takes at most a third of the time, as what is waited for needs the CPU, too.
    """
    timeout_s *= PATIENCE
    give_up_at = time.monotonic() + timeout_s
    while True:
        looked_at = time.monotonic()
        if condition():
            return
        now = time.monotonic()
        assert now < give_up_at, f"waited {timeout_s} s in vain until {what}"
        time.sleep(min(max(0.01, 2 * (now - looked_at)), 0.2))


def take_port(host: Host, port: int) -> socket.socket:
    """Listen at *port* of *host*, as soon as the proxy that had it is gone.

    A program that the proxy was starting when it was killed holds its sockets until it runs.
    """
    taken: list[socket.socket] = []

    def is_taken() -> bool:
        with host.inside(), contextlib.suppress(OSError):
            taken.append(socket.create_server(("0.0.0.0", port)))
        return bool(taken)

    wait_until(is_taken, f"port {port} is free")
    return taken[0]


def processes_with(mark: str) -> list[str]:
    """Return the command lines of the processes that have *mark* in their environment, so other runs do not count."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return found


# ---- servers


def start_udp_server(pod: Host) -> subprocess.Popen[bytes]:
    process = pod.start(sys.executable, str(BACKEND), pod.name, str(UDP_PORT))
    wait_until(lambda: ask_udp(pod, "127.0.0.1", UDP_PORT, timeout_s=0.1), f"the UDP server in {pod.name} answers")
    return process


# ---- clients


def answers(host: Host, ip: str, port: int) -> str:
    """Return the name of the server that answers, "" if none does."""
    with contextlib.suppress(OSError):
        return ask(host, ip, port, timeout_s=1.0)
    return ""


def udp_socket(host: Host, ip: str, port: int, timeout_s: float = 2.0) -> socket.socket:
    """Return a UDP socket on *host* that receives only from *ip* and *port*.

    Its own port differs from those of earlier ones, whose flows may still be there: it begins a flow.
    """
    with host.inside():
        sock = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(timeout_s)
    for own_port in _UDP_PORTS:
        with contextlib.suppress(OSError):  # another socket has it
            sock.bind(("", own_port))
            break
    try:
        sock.connect((ip, port))
    except OSError:
        sock.close()
        raise
    return sock


def ask_udp(host: Host, ip: str, port: int = 53, timeout_s: float = 2.0) -> str:
    """Send one datagram from a new socket; return the server that answered, "" if none did."""
    with contextlib.suppress(OSError), udp_socket(host, ip, port, timeout_s) as sock:
        sock.send(b"who")
        return sock.recv(65_536).decode()
    return ""


def is_refused(host: Host, ip: str, port: int, timeout_s: float = 2.0) -> bool:
    """Whether a TCP connection is refused, which is neither accepted nor left without an answer."""
    try:
        connect(host, ip, port, timeout_s).close()
    except ConnectionRefusedError:
        return True
    except (TimeoutError, ConnectionResetError):
        return False
    return False


def is_refused_udp(host: Host, ip: str, port: int, timeout_s: float = 2.0) -> bool:
    """The same for UDP: whether an ICMP message refuses. EPERM (a rule for the node's own packets) does not count."""
    try:
        with udp_socket(host, ip, port, timeout_s) as sock:
            sock.send(b"who")
            sock.recv(65_536)
    except ConnectionRefusedError:
        return True
    except (TimeoutError, PermissionError):
        return False
    return False


# ---- the proxy


class Proxy:
    """`userspace-proxy run` on the lab's node, over a folder of manifests."""

    def __init__(self, world: ServiceLab, folder: Path, rules: str = "nftables", loop: str = "uvloop") -> None:
        self.world = world
        self.node = world.node
        self.folder = folder
        self.rules = rules
        self.loop = loop
        self.verbose = True
        self.manifests = folder / "manifests"
        self.manifests.mkdir(parents=True, exist_ok=True)
        self.log_file = folder / "log"
        self.access_file = folder / "access.log"
        self.process: subprocess.Popen[bytes] | None = None

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "userspace_proxy", *arguments]

    def run_arguments(self) -> list[str]:
        told = ["--verbose", "--access-log", str(self.access_file)] if self.verbose else []
        return [
            *("run", str(self.manifests), "--rules", self.rules, "--loop", self.loop),
            *("--state-dir", str(self.folder / "state"), *told),
        ]

    def start(self, *arguments: str, wait: bool = True) -> None:
        self.log_file.write_text("")
        self.process = self.node.start(*self.command(*self.run_arguments(), *arguments), log=self.log_file)
        if wait:
            self.wait_ready()

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        def is_ready() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, f"the proxy ended: {self.log()}"
            return "ready:" in self.log()

        try:
            wait_until(is_ready, "the proxy is ready", timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{error}; its log: {self.log()}") from None

    def wait_logged(self, text: str) -> None:
        """Wait until the log has *text*: a thread writes it, later than the event."""
        wait_until(lambda: text in self.log(), f"the log says {text!r}")

    def log(self) -> str:
        return self.log_file.read_text()

    def access_lines(self) -> list[str]:
        return self.access_file.read_text().splitlines() if self.access_file.exists() else []

    def apply(self, name: str, manifest: str) -> None:
        """Put *manifest* in place as an editor does: a whole new file."""
        temporary = self.manifests / f".{name}.new"
        temporary.write_text(manifest)
        temporary.replace(self.manifests / f"{name}.yaml")

    def serve(self, name: str, cluster_ip: str, *pods: str, extra: str = "", http_port: int = HTTP_PORT) -> None:
        """Bring a Service with an http and a dns port, or another version of it, and wait until it is in force."""
        self.apply(name, documents(service(name, cluster_ip, extra=extra), endpoints(name, *pods, http_port=http_port)))

        def is_in_force() -> bool:
            text = self.metrics_text()
            known = [sample(text, "userspace_proxy_endpoints", service=name, port=port) for port in ("http", "dns")]
            return known == [len(pods)] * 2 and f'"default/{name}:http"' in self.rules_text()

        wait_until(is_in_force, f"{name} is served")

    def delete(self, name: str) -> None:
        (self.manifests / f"{name}.yaml").unlink(missing_ok=True)

    def stop(self, signum: int = signal.SIGINT, timeout_s: float = 20.0) -> int:
        """Stop the proxy, by default so that its rules are removed in every mode; return its exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signum)
        return self.process.wait(timeout_s * PATIENCE)

    def end(self) -> None:
        """Remove the proxy from the node in any state: later tests start another one there.

        In this process instead of by the command cleanup, whose start takes more CPU than all else of an end.
        """
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(20)
        with self.node.inside():
            asyncio.run(remove_all())

    def workers(self) -> list[int]:
        """Return the process ids of the data plane."""
        assert self.process is not None
        command = ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(self.process.pid)]
        listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
        return [int(line.split()[0]) for line in listed if "userspace_proxy.dataplane.worker" in line]

    def get(self, path: str, port: int) -> tuple[int, str]:
        with connect(self.node, "127.0.0.1", port) as sock:
            sock.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            received = b""
            while part := sock.recv(1 << 16):
                received += part
        head, _, body = received.decode().partition("\r\n\r\n")
        return int(head.split()[1]), body

    def metrics_text(self) -> str:
        return self.get("/metrics", 10249)[1]

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples that have *labels*."""
        return sample(self.metrics_text(), name, **labels)

    def rules_text(self) -> str:
        """Every rule of the node, in the words of the language in use."""
        if self.rules == "nftables":
            return self.node.run("nft", "list", "ruleset").stdout
        return self.node.run("iptables-save").stdout + self.node.run("ip6tables-save").stdout

    def proxy_port(self, name: str) -> int:
        """Return where the rule of the service port *name* leads."""
        for line in self.rules_text().splitlines():
            found = re.search(rf'"{re.escape(name)}".*?(\d+)\D*$', line)
            if found:
                return int(found[1])
        raise AssertionError(f"no rule is commented {name}")


def sample(text: str, name: str, **labels: str) -> float:
    """Return the sum of the samples of metric *name* in *text* that have *labels*."""
    samples = re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE)
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    return sum(float(value) for labelled, value in samples if all(each in labelled for each in wanted))


# ---- manifests


def service(
    name: str,
    cluster_ip: str,
    ports: str = "[{name: http, port: 80}, {name: dns, port: 53, protocol: UDP}]",
    extra: str = "",
) -> str:
    return f"""\
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec:
  clusterIP: {json.dumps(cluster_ip)}
  ports: {ports}
{extra}
"""


def endpoints(name: str, *addresses: str, http_port: int = HTTP_PORT, conditions: str = "{}") -> str:
    family = "IPv6" if addresses and ":" in addresses[0] else "IPv4"
    listed = ", ".join(f'{{addresses: ["{a}"], conditions: {conditions}}}' for a in addresses)
    return f"""\
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}-{family.lower()}, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: {family}
ports: [{{name: http, port: {http_port}}}, {{name: dns, port: {UDP_PORT}, protocol: UDP}}]
endpoints: [{listed}]
"""


def documents(*parts: str) -> str:
    return "---\n".join(parts)


@contextlib.contextmanager
def background_requests(request: Callable[[], object]) -> Iterator[list[BaseException | object]]:
    """Repeat *request* in a thread while the block runs; yields the list of results, errors included.

    Another one begins a millisecond after the last one: without a pause, most of the CPU goes to requests, so that what
    they are to meet takes longer and fewer of them meet it.
    """
    import threading

    outcomes: list[BaseException | object] = []
    done = threading.Event()

    def repeat() -> None:
        while not done.is_set():
            try:
                outcomes.append(request())
            except OSError as error:
                outcomes.append(error)
            time.sleep(_REQUEST_PAUSE_S)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield outcomes
    finally:
        done.set()
        thread.join(10)


def serve_web(proxy: Proxy, cluster_ip: str = "10.96.4.1") -> None:
    proxy.apply("web", documents(service("web", cluster_ip), endpoints("web", POD1, POD2)))


def traces(node: Host) -> str:
    """Everything of ours that a node can show."""
    shown = [
        node.run("nft", "list", "ruleset").stdout,
        node.run("iptables-save").stdout + node.run("ip6tables-save").stdout,
        node.ip("route", "show", "proto", "107") + node.ip("-6", "route", "show", "proto", "107"),
    ]
    text = "".join(shown)
    return "\n".join(line for line in text.splitlines() if "userspace" in line.lower() or "proto 107" in line)


def told(node: Host, proxy: Proxy, *arguments: str, prefix: tuple[str, ...] = ()) -> str:
    """Return the one line that comes back from a command that cannot work."""
    done = node.run(*prefix, *proxy.command(*arguments), check=False, timeout_s=20)
    assert done.returncode == 1, done
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


@contextlib.contextmanager
def open_connection(proxy: Proxy, *arguments: str) -> Iterator[socket.socket]:
    """Start *proxy* with one Service; yield a client's connection, whose backend has sent a greeting and waits."""
    pod, cluster_ip = proxy.world.pods[0], "10.96.4.2"
    holder = pod.start(sys.executable, "-c", _HOLDER)
    http = service("hold", cluster_ip, "[{name: http, port: 80}]")
    proxy.apply("hold", documents(http, endpoints("hold", POD1, http_port=9000)))
    proxy.start(*arguments)
    try:
        with connect(proxy.world.client, cluster_ip, 80) as sock:
            assert sock.recv(5) == b"hello"
            yield sock
    finally:
        holder.kill()
