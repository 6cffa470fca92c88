"""The compared modes: what is between client and pod, how it is started, and whether it is a mode of this proxy.

A mode of this proxy is ``userspace-proxy run --proxy-mode X`` on its own node. It reports itself at its start what this
machine or build lacks; `ComparedMode.missing` only checks for tools.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from userspace_proxy.compare.nodes import PEERS, ModeNode, load_stream_module
from userspace_proxy.compare.results import DIRECT, DIRECT_AGAIN, Kind
from userspace_proxy.lab import start_proxy
from userspace_proxy.modes import MODES as PROXY_MODES

HAPROXY, NGINX = "haproxy", "nginx"
USERSPACE, USERSPACE_COPY, IPTABLES, NFTABLES, IPVS = "userspace", "userspace-copy", "iptables", "nftables", "ipvs"


@dataclass(frozen=True, slots=True)
class ComparedMode:
    """One mode to compare. ``ours``: a mode of this proxy, which serves manifests.

    ``udp``: it carries datagrams.
    """

    name: str
    title: str
    kind: Kind
    start: Callable[[ModeNode], None]
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


# ---- direct


def _start_direct(node: ModeNode) -> None:
    node.front_ip = node.pod_ip


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
    # The range keeps unserved addresses on this node.
    options = ("--service-cluster-ip-range", node.service_range, *arguments)
    node.processes.append(start_proxy(node.host, folder, node.folder / "log", *options))
    node.front_ip = node.service_ip()


# ---- others


def _start_haproxy(node: ModeNode) -> None:
    config = node.fill_in(PEERS / "haproxy.cfg", folder=node.folder)
    node.start("haproxy", "-db", "-q", "-f", str(config))
    node.front_ip = node.node_ip


def _start_nginx(node: ModeNode) -> None:
    module = load_stream_module()
    config = node.fill_in(PEERS / "nginx-stream.conf", folder=node.folder, load_stream_module=module)
    node.start("nginx", "-p", str(node.folder), "-c", str(config))
    node.front_ip = node.node_ip


def _ours(name: str, title: str, kind: Kind, *arguments: str) -> ComparedMode:
    return ComparedMode(name, title, kind, _start_ours(*arguments), ours=True)


MODES: tuple[ComparedMode, ...] = (
    ComparedMode(DIRECT, "direct (no Service)", "none", _start_direct),
    ComparedMode(DIRECT_AGAIN, "direct, once more", "none", _start_direct),
    # Modes in which the kernel serves, then those in which a process does.
    *(
        _ours(mode.name, mode.name, "kernel" if mode.kernel_serves else "proxy", "--proxy-mode", mode.name)
        for mode in sorted(PROXY_MODES.values(), key=lambda mode: not mode.kernel_serves)
    ),
    _ours(USERSPACE_COPY, "userspace, copying", "proxy", "--splice", "copy"),
    ComparedMode(HAPROXY, "HAProxy", "proxy", _start_haproxy, tools=(("haproxy", "haproxy"),), udp=False),
    ComparedMode(NGINX, "nginx stream", "proxy", _start_nginx),
)
