"""The planes that are compared: what stands between client and backend, and how each is started."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.sites import Site, load_stream_module

# Engines of ours: name and arguments of `run`. One more is one more line.
ENGINES: tuple[tuple[str, tuple[str, ...]], ...] = (("auto", ()), ("copy", ("--splice", "copy")))

HAPROXY, HAPROXY_TUNED, NGINX = "HAProxy", "HAProxy tuned", "nginx stream"


@dataclass(frozen=True, slots=True)
class Plane:
    """One thing to compare. ``proxy``: it has a process; ``udp``: it can carry datagrams."""

    name: str
    start: Callable[[Site], None]
    proxy: bool = True
    udp: bool = True
    ours: bool = False


def _direct(site: Site) -> None:
    site.front_ip = site.pod_ip


def _iptables(site: Site) -> None:
    rules = site.peer_file("iptables.rules").read_text()
    site.node.run("iptables-restore", stdin=rules)
    site.front_ip = site.service_ip


def _nft(site: Site) -> None:
    site.node.run("nft", "-f", str(site.peer_file("nft.rules")))
    site.front_ip = site.service_ip


def _haproxy(config: str) -> Callable[[Site], None]:
    def start(site: Site) -> None:
        site.start("haproxy", "-db", "-q", "-f", str(site.peer_file(config)))
        site.front_ip = site.node_ip

    return start


def _nginx(site: Site) -> None:
    config = site.peer_file("nginx-stream.conf", folder=site.folder, load_stream_module=load_stream_module())
    site.start("nginx", "-p", str(site.folder), "-c", str(config))
    site.front_ip = site.node_ip


def start_userspace_proxy(site: Site, arguments: tuple[str, ...]) -> Path:
    """Start our proxy on *site*; return the folder whose manifests it serves."""
    manifests = site.folder / "manifests"
    manifests.mkdir(exist_ok=True)
    site.peer_file("userspace_proxy.yaml").replace(manifests / "bench.yaml")
    command = [sys.executable, "-m", "userspace_proxy", "run", str(manifests), "--rules", "nftables"]
    site.start(*command, "--state-dir", str(site.folder / "state"), "--capture", "redirect", *arguments)
    site.front_ip = site.service_ip
    return manifests


def _ours(arguments: tuple[str, ...]) -> Callable[[Site], None]:
    def start(site: Site) -> None:
        start_userspace_proxy(site, arguments)

    return start


PLANES: tuple[Plane, ...] = (
    Plane("direct", _direct, proxy=False),
    Plane("iptables DNAT", _iptables, proxy=False),
    Plane("nft DNAT", _nft, proxy=False),
    Plane(HAPROXY, _haproxy("haproxy.cfg"), udp=False),
    Plane(HAPROXY_TUNED, _haproxy("haproxy-tuned.cfg"), udp=False),
    Plane(NGINX, _nginx),
    *(Plane(f"ours, {engine}", _ours(arguments), ours=True) for engine, arguments in ENGINES),
)
