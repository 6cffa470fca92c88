"""The planes that are compared: what stands between client and backend, and how each is started."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from userspace_proxy.compare.modes import DIRECT, MODES
from userspace_proxy.compare.modes import HAPROXY as HAPROXY_MODE
from userspace_proxy.compare.modes import NGINX as NGINX_MODE
from userspace_proxy.compare.sites import Site

# Engines of ours: name and arguments of `run`. One more is one more line.
ENGINES: tuple[tuple[str, tuple[str, ...]], ...] = (("auto", ()), ("copy", ("--splice", "copy")))

HAPROXY, HAPROXY_TUNED, NGINX = "HAProxy", "HAProxy tuned", "nginx stream"
_PEERS = Path(__file__).parent / "peers"
_MODES = {mode.name: mode for mode in MODES}


@dataclass(frozen=True, slots=True)
class Plane:
    """One thing to compare. ``proxy``: it has a process; ``udp``: it can carry datagrams."""

    name: str
    start: Callable[[Site], None]
    proxy: bool = True
    udp: bool = True
    ours: bool = False


def _iptables(site: Site) -> None:
    rules = site.fill_in(_PEERS / "iptables.rules").read_text()
    site.node.run("iptables-restore", stdin=rules)
    site.front_ip = site.service_ip()


def _nft(site: Site) -> None:
    site.node.run("nft", "-f", str(site.fill_in(_PEERS / "nft.rules")))
    site.front_ip = site.service_ip()


def _haproxy_tuned(site: Site) -> None:
    site.start("haproxy", "-db", "-q", "-f", str(site.fill_in(_PEERS / "haproxy-tuned.cfg")))
    site.front_ip = site.node_ip


def start_userspace_proxy(site: Site, arguments: tuple[str, ...]) -> Path:
    """Start our proxy on *site*; return the folder whose manifests it serves."""
    manifests = site.folder / "manifests"
    manifests.mkdir(exist_ok=True)
    site.fill_in(_PEERS / "userspace_proxy.yaml", manifests / "bench.yaml")
    command = [sys.executable, "-P", "-m", "userspace_proxy", "run", str(manifests), "--rules", "nftables"]
    options = ["--state-dir", str(site.folder / "state"), "--service-cluster-ip-range", site.service_range]
    site.start(*command, *options, "--capture", "redirect", *arguments)
    site.front_ip = site.service_ip()
    return manifests


def _ours(arguments: tuple[str, ...]) -> Callable[[Site], None]:
    def start(site: Site) -> None:
        start_userspace_proxy(site, arguments)

    return start


PLANES: tuple[Plane, ...] = (
    Plane("direct", _MODES[DIRECT].start, proxy=False),
    Plane("iptables DNAT", _iptables, proxy=False),
    Plane("nft DNAT", _nft, proxy=False),
    Plane(HAPROXY, _MODES[HAPROXY_MODE].start, udp=False),
    Plane(HAPROXY_TUNED, _haproxy_tuned, udp=False),
    Plane(NGINX, _MODES[NGINX_MODE].start),
    *(Plane(f"ours, {engine}", _ours(arguments), ours=True) for engine, arguments in ENGINES),
)
