"""The compared modes: what is between client and pod, how it is started, and whether it is a mode of this proxy.

A mode of this proxy is ``userspace-proxy run --proxy-mode X`` on its own node. It reports itself at its start what this
machine or build lacks; `ComparedMode.missing` only checks for tools.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from userspace_proxy.compare.nodes import PEERS, TRIO, ModeNode, load_stream_module
from userspace_proxy.compare.results import DIRECT, DIRECT_AGAIN, Kind
from userspace_proxy.lab import start_proxy
from userspace_proxy.modes import MODES as PROXY_MODES

HAPROXY, NGINX = "haproxy", "nginx"
USERSPACE, USERSPACE_COPY, IPTABLES, NFTABLES, IPVS = "userspace", "userspace-copy", "iptables", "nftables", "ipvs"


@dataclass(frozen=True, slots=True)
class ComparedMode:
    """One mode to compare. ``ours``: a mode of this proxy, which serves manifests.

    ``udp``: it carries datagrams. ``tell`` makes the mode use only the numbered ones of the three pods as endpoints.
    """

    name: str
    title: str
    kind: Kind
    start: Callable[[ModeNode], None]
    tell: Callable[[ModeNode, Iterable[int]], None]
    tools: tuple[tuple[str, str], ...] = ()
    ours: bool = False
    udp: bool = True

    def missing(self) -> str | None:
        """Return what this machine lacks for the mode, or None if nothing is known to be missing."""
        for tool, package in self.tools:
            if shutil.which(tool) is None:
                return f"{tool} is not installed (package {package})"
        if self.name == NGINX and load_stream_module() is None:
            return "this nginx has no stream module (package libnginx-mod-stream)"
        return None

    def trio_addresses(self, node: ModeNode, alive: Iterable[int]) -> list[tuple[str, int]]:
        """Return the addresses that a client dials in turn to reach the three pods."""
        if self.kind == "none":
            return [(node.trio_ips[index], 8080) for index in alive]
        if self.ours:
            return [(node.service_ip(1), TRIO)]
        return [(node.front_ip, TRIO)]


# ---- direct


def _start_direct(node: ModeNode) -> None:
    node.front_ip = node.pod_ip


def _tell_nothing(_: ModeNode, __: Iterable[int]) -> None:
    """Do nothing: clients dial the pods themselves."""


# ---- ours


def manifests_of(node: ModeNode) -> Path:
    """Return the manifest folder that the mode serves."""
    return node.folder / "manifests"


def _start_ours(*arguments: str) -> Callable[[ModeNode], None]:
    return lambda node: start_ours(node, PEERS / "services.yaml", *arguments)


def start_ours(node: ModeNode, services: Path, *arguments: str) -> None:
    """Start a mode of this proxy on *node* with the Services in the template *services*."""
    folder = manifests_of(node)
    folder.mkdir(exist_ok=True)
    node.fill_in(services, folder / "services.yaml")
    _tell_by_manifest(node, range(len(node.trio_ips)))
    # The range keeps unserved addresses on this node.
    options = ("--service-cluster-ip-range", node.service_range, *arguments)
    node.processes.append(start_proxy(node.host, folder, node.folder / "log", *options))
    node.front_ip = node.service_ip()


def _tell_by_manifest(node: ModeNode, alive: Iterable[int]) -> None:
    endpoints = ", ".join(f"{{addresses: [{node.trio_ips[index]}]}}" for index in alive)
    node.fill_in(PEERS / "trio.yaml", manifests_of(node) / "trio.yaml", endpoints=f"[{endpoints}]")


# ---- others


def _start_haproxy(node: ModeNode) -> None:
    config = node.fill_in(PEERS / "haproxy.cfg", folder=node.folder)
    node.start("haproxy", "-db", "-q", "-f", str(config))
    node.front_ip = node.node_ip


def _tell_haproxy(node: ModeNode, alive: Iterable[int]) -> None:
    set_haproxy_servers(node.folder / "control", "trio", len(node.trio_ips), alive)


def set_haproxy_servers(socket_path: Path, backend: str, count: int, alive: Iterable[int]) -> None:
    """Set the state of *count* servers through HAProxy's control socket, as ingress controllers do."""
    ready = set(alive)
    for index in range(count):
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(2.0)
            control.connect(str(socket_path))
            state = "ready" if index in ready else "maint"
            control.sendall(f"set server {backend}/pod{index} state {state}\n".encode())
            control.recv(1024)


def _write_nginx(node: ModeNode, alive: Iterable[int]) -> Path:
    is_up = "" if 1 in set(alive) else "down"
    return node.fill_in(
        PEERS / "nginx-stream.conf", folder=node.folder, load_stream_module=load_stream_module(), trio1_is=is_up
    )


def _start_nginx(node: ModeNode) -> None:
    config = _write_nginx(node, range(len(node.trio_ips)))
    node.start("nginx", "-p", str(node.folder), "-c", str(config))
    node.front_ip = node.node_ip


def _tell_nginx(node: ModeNode, alive: Iterable[int]) -> None:
    config = _write_nginx(node, alive)
    node.host.run("nginx", "-p", str(node.folder), "-c", str(config), "-s", "reload")


def _ours(name: str, title: str, kind: Kind, *arguments: str) -> ComparedMode:
    return ComparedMode(name, title, kind, _start_ours(*arguments), _tell_by_manifest, ours=True)


MODES: tuple[ComparedMode, ...] = (
    ComparedMode(DIRECT, "direct (no Service)", "none", _start_direct, _tell_nothing),
    ComparedMode(DIRECT_AGAIN, "direct, once more", "none", _start_direct, _tell_nothing),
    # Modes in which the kernel serves, then those in which a process does.
    *(
        _ours(mode.name, mode.name, "kernel" if mode.kernel_serves else "proxy", "--proxy-mode", mode.name)
        for mode in sorted(PROXY_MODES.values(), key=lambda mode: not mode.kernel_serves)
    ),
    _ours(USERSPACE_COPY, "userspace, copying", "proxy", "--splice", "copy"),
    ComparedMode(
        HAPROXY, "HAProxy", "proxy", _start_haproxy, _tell_haproxy, tools=(("haproxy", "haproxy"),), udp=False
    ),
    ComparedMode(NGINX, "nginx stream", "proxy", _start_nginx, _tell_nginx),
)
