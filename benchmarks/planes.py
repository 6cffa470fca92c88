"""The planes that are compared: what is between client and backend, and how each is started."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from userspace_proxy.compare.modes import HAPROXY, MODES, NGINX, ComparedMode, start_ours
from userspace_proxy.compare.nodes import ModeNode
from userspace_proxy.compare.results import DIRECT

# Engines of ours: name and arguments of `run`.
ENGINES: tuple[tuple[str, tuple[str, ...]], ...] = (("auto", ()), ("copy", ("--splice", "copy")))

HAPROXY_TUNED = "haproxy-tuned"
_BEHIND = "-behind-redirect"
# Capturing a Service's traffic is part of a proxy's job: these are what ours is judged by.
HAPROXY_LIKE, HAPROXY_TUNED_LIKE, NGINX_LIKE = (f"{name}{_BEHIND}" for name in (HAPROXY, HAPROXY_TUNED, NGINX))
_PEERS = Path(__file__).parent / "peers"
_MODES = {mode.name: mode for mode in MODES}


def _iptables(node: ModeNode) -> None:
    rules = node.fill_in(_PEERS / "iptables.rules").read_text()
    node.host.run("iptables-restore", stdin=rules)
    node.front_ip = node.service_ip()


def _nft(node: ModeNode) -> None:
    node.host.run("nft", "-f", str(node.fill_in(_PEERS / "nft.rules")))
    node.front_ip = node.service_ip()


def _haproxy_tuned(node: ModeNode) -> None:
    node.start("haproxy", "-db", "-q", "-f", str(node.fill_in(_PEERS / "haproxy-tuned.cfg")))
    node.front_ip = node.node_ip


def _behind_redirect(plane: ComparedMode) -> ComparedMode:
    """Return *plane* as a Service's proxy: clients dial a cluster IP, which a rule redirects to it."""

    def start(node: ModeNode) -> None:
        plane.start(node)
        node.host.run("nft", "-f", str(node.fill_in(_PEERS / "redirect.rules")))
        node.front_ip = node.service_ip()

    return replace(plane, name=f"{plane.name}{_BEHIND}", title=f"{plane.title}, redirected", start=start)


def start_engine(node: ModeNode, arguments: tuple[str, ...]) -> None:
    """Start our proxy on *node* with the *arguments* of an engine."""
    start_ours(node, _PEERS / "userspace_proxy.yaml", "--rules", "nftables", "--capture", "redirect", *arguments)


def _ours(engine: str, arguments: tuple[str, ...]) -> ComparedMode:
    def start(node: ModeNode) -> None:
        start_engine(node, arguments)

    return ComparedMode(f"ours-{engine}", f"ours, {engine}", "proxy", start, ours=True)


_PROXIES = (
    _MODES[HAPROXY],
    ComparedMode(HAPROXY_TUNED, "HAProxy tuned", "proxy", _haproxy_tuned, udp=False),
    _MODES[NGINX],
)
PLANES: tuple[ComparedMode, ...] = (
    replace(_MODES[DIRECT], title="direct"),
    ComparedMode("iptables-dnat", "iptables DNAT", "kernel", _iptables),
    ComparedMode("nft-dnat", "nft DNAT", "kernel", _nft),
    *_PROXIES,
    *map(_behind_redirect, _PROXIES),
    *(_ours(engine, arguments) for engine, arguments in ENGINES),
)
