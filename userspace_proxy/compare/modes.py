"""The compared modes: what is between client and pod, how it is started, and whether it is a mode of this proxy.

A mode of this proxy is ``userspace-proxy run --proxy-mode X`` on its own node. It reports itself at its start what this
machine or build lacks; `Mode.missing` only checks for tools.
"""

from __future__ import annotations

import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from userspace_proxy.compare.results import Kind
from userspace_proxy.compare.sites import PEERS, TRIO, Site, load_stream_module
from userspace_proxy.errors import StartError
from userspace_proxy.modes import MODES as PROXY_MODES

DIRECT, DIRECT_AGAIN, HAPROXY, NGINX = "direct", "direct again", "haproxy", "nginx"
USERSPACE, USERSPACE_COPY, IPTABLES, NFTABLES, IPVS = "userspace", "userspace-copy", "iptables", "nftables", "ipvs"
_USAGE_ERROR = 2
_SETTLE_S = 0.1


@dataclass(frozen=True, slots=True)
class Mode:
    """One mode to compare. ``ours``: a mode of this proxy, which serves manifests.

    ``tell`` makes the mode use only the numbered ones of the three pods as endpoints.
    """

    name: str
    title: str
    kind: Kind
    start: Callable[[Site], None]
    tell: Callable[[Site, Iterable[int]], None]
    tools: tuple[tuple[str, str], ...] = ()
    ours: bool = False

    def missing(self) -> str | None:
        """Return what this machine lacks for the mode, or None if nothing is known to be missing."""
        for tool, package in self.tools:
            if shutil.which(tool) is None:
                return f"{tool} is not installed (package {package})"
        if self.name == NGINX and load_stream_module() is None:
            return "this nginx has no stream module (package libnginx-mod-stream)"
        return None

    def trio_addresses(self, site: Site, alive: Iterable[int]) -> list[tuple[str, int]]:
        """Return the addresses that a client dials in turn to reach the three pods."""
        if self.kind == "none":
            return [(site.trio_ips[index], 8080) for index in alive]
        if self.ours:
            return [(site.service_ip(1), TRIO)]
        return [(site.front_ip, TRIO)]


# ---- direct


def _start_direct(site: Site) -> None:
    site.front_ip = site.pod_ip


def _tell_nobody(_: Site, __: Iterable[int]) -> None:
    """Do nothing: clients dial the pods themselves."""


# ---- ours


def manifests_of(site: Site) -> Path:
    """Return the manifest folder that the mode serves."""
    return site.folder / "manifests"


def run_command(site: Site, *arguments: str) -> list[str]:
    """Return the command line that starts a mode of this proxy."""
    command = [sys.executable, "-P", "-m", "userspace_proxy", "run", str(manifests_of(site))]
    # The range keeps unserved addresses on this node; the state folder excludes the state of other runs.
    state, services = str(site.folder / "state"), site.service_range
    return [*command, "--state-dir", state, "--service-cluster-ip-range", services, *arguments]


def _start_ours(*arguments: str) -> Callable[[Site], None]:
    def start(site: Site) -> None:
        manifests_of(site).mkdir(exist_ok=True)
        site.fill_in(PEERS / "services.yaml", manifests_of(site) / "services.yaml")
        _tell_by_manifest(site, range(len(site.trio_ips)))
        process = site.start(*run_command(site, *arguments))
        site.front_ip = site.service_ip()
        give_up_at = time.monotonic() + 20.0
        while "ready" not in site.log():
            if process.poll() is not None or time.monotonic() > give_up_at:
                raise StartError(_reason(site, process.poll(), arguments))
            time.sleep(0.01)

    return start


def _reason(site: Site, code: int | None, arguments: tuple[str, ...]) -> str:
    """Return why a mode of this proxy did not start: its last log line, or that this build does not have it."""
    if code == _USAGE_ERROR:
        return f"this build has no {' '.join(arguments)}"
    return (site.log().splitlines() or ["it did not start, and did not say why"])[-1].removeprefix("userspace-proxy: ")


def _tell_by_manifest(site: Site, alive: Iterable[int]) -> None:
    endpoints = ", ".join(f"{{addresses: [{site.trio_ips[index]}]}}" for index in alive)
    site.fill_in(PEERS / "trio.yaml", manifests_of(site) / "trio.yaml", endpoints=f"[{endpoints}]")


# ---- others


def _start_haproxy(site: Site) -> None:
    config = site.fill_in(PEERS / "haproxy.cfg", folder=site.folder)
    site.start("haproxy", "-db", "-q", "-f", str(config))
    site.front_ip = site.node_ip


def _tell_haproxy(site: Site, alive: Iterable[int]) -> None:
    """Set the servers' state through HAProxy's control socket, as ingress controllers do."""
    ready = set(alive)
    for index in range(len(site.trio_ips)):
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(2.0)
            control.connect(str(site.folder / "control"))
            control.sendall(f"set server trio/pod{index} state {'ready' if index in ready else 'maint'}\n".encode())
            control.recv(1024)


def _write_nginx(site: Site, alive: Iterable[int]) -> Path:
    is_up = "" if 1 in set(alive) else "down"
    return site.fill_in(
        PEERS / "nginx-stream.conf", folder=site.folder, load_stream_module=load_stream_module(), trio1_is=is_up
    )


def _start_nginx(site: Site) -> None:
    config = _write_nginx(site, range(len(site.trio_ips)))
    site.start("nginx", "-p", str(site.folder), "-c", str(config))
    site.front_ip = site.node_ip


def _tell_nginx(site: Site, alive: Iterable[int]) -> None:
    config = _write_nginx(site, alive)
    site.node.run("nginx", "-p", str(site.folder), "-c", str(config), "-s", "reload")


def _ours(name: str, title: str, kind: Kind, *arguments: str) -> Mode:
    return Mode(name, title, kind, _start_ours(*arguments), _tell_by_manifest, ours=True)


MODES: tuple[Mode, ...] = (
    Mode(DIRECT, "direct (no Service)", "none", _start_direct, _tell_nobody),
    Mode(DIRECT_AGAIN, "direct, once more", "none", _start_direct, _tell_nobody),
    # Modes in which the kernel serves, then those in which a process does.
    *(
        _ours(mode.name, mode.name, "kernel" if mode.kernel_serves else "proxy", "--proxy-mode", mode.name)
        for mode in sorted(PROXY_MODES.values(), key=lambda mode: not mode.kernel_serves)
    ),
    _ours(USERSPACE_COPY, "userspace, copying", "proxy", "--splice", "copy"),
    Mode(HAPROXY, "HAProxy", "proxy", _start_haproxy, _tell_haproxy, tools=(("haproxy", "haproxy"),)),
    Mode(NGINX, "nginx stream", "proxy", _start_nginx, _tell_nginx),
)
