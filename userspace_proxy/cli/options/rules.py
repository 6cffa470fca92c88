"""Options that say what is set in the kernel: the mode, its rules, who counts as a pod, conntrack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from userspace_proxy.cli.options.reading import (
    CIDRS,
    DEFAULTS,
    INTERFACE,
    NODE_PORT_ADDRESSES,
    PORT_RANGE,
    SECONDS,
    shown,
    together,
)
from userspace_proxy.model.service import IPVS_SCHEDULERS

_Function = TypeVar("_Function", bound=Callable[..., Any])

MODES_OF_KERNEL = ("nftables", "iptables", "ipvs")

RULES = click.option(
    "--rules",
    type=click.Choice(["auto", "nftables", "iptables"]),
    default=DEFAULTS.rules,
    show_default=True,
    help="The rule language.",
)
PROXY_PORTS = click.option(
    "--proxy-port-range",
    type=PORT_RANGE,
    default="-".join(map(str, DEFAULTS.proxy_port_range)),
    show_default=True,
    help="Local ports that rules redirect to.",
)

CAPTURE = click.option(
    "--capture",
    type=click.Choice(["auto", "redirect", "address"]),
    default=DEFAULTS.capture,
    show_default=True,
    help="REDIRECT, or DNAT to a private address on lo (where interfaces have none of their own).",
)
STATE_DIR = click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    show_default="/var/lib/userspace-proxy where writable",
    help="Remembers allocated addresses, node ports and proxy ports.",
)


def proxy_mode(*more: str) -> Callable[[_Function], _Function]:
    return click.option(
        "--proxy-mode",
        type=click.Choice(["userspace", *MODES_OF_KERNEL, *more]),
        default=DEFAULTS.proxy_mode,
        show_default=True,
        help="Who serves: sockets of ours, or the kernel, by nftables rules, kube-proxy's iptables chains, or IPVS.",
    )


KERNEL_MODES = together(
    click.option(
        "--masquerade-all", is_flag=True, help="In kernel modes: endpoints never see who dialled a cluster IP."
    ),
    click.option(
        "--iptables-masquerade-bit",
        "masquerade_bit",
        type=click.IntRange(0, 31),
        default=DEFAULTS.masquerade_bit,
        show_default=True,
        help="In iptables mode: the bit of packet marks that says that the sender's address is to be replaced.",
    ),
    click.option(
        "--iptables-localhost-nodeports/--no-iptables-localhost-nodeports",
        "localhost_nodeports",
        default=DEFAULTS.localhost_nodeports,
        show_default=True,
        help="In iptables mode: serve node ports at 127.0.0.1, too.",
    ),
    click.option(
        "--ipvs-scheduler",
        type=click.Choice(IPVS_SCHEDULERS),
        metavar="NAME",
        default=DEFAULTS.ipvs_scheduler,
        show_default=True,
        help="In ipvs mode: who chooses for Services without the annotation userspace-proxy/ipvs-scheduler.",
    ),
    click.option(
        "--ipvs-strict-arp",
        is_flag=True,
        help="In ipvs mode: answer ARP for addresses of the interface that is asked alone (arp_ignore, arp_announce).",
    ),
)

LOCAL_TRAFFIC = together(
    click.option(
        "--detect-local-mode",
        type=click.Choice(["ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"]),
        default=DEFAULTS.detect_local_mode,
        show_default=True,
        help="How a pod is told from other clients.",
    ),
    click.option(
        "--cluster-cidr",
        "cluster_cidrs",
        type=CIDRS,
        default=DEFAULTS.cluster_cidrs,
        help="Addresses of the cluster's pods, for --detect-local-mode ClusterCIDR; one range a family.",
    ),
    click.option(
        "--pod-bridge-interface",
        type=INTERFACE,
        default=None,
        help="The bridge that this node's pods are at, for --detect-local-mode BridgeInterface.",
    ),
    click.option(
        "--pod-interface-name-prefix",
        type=INTERFACE,
        default=None,
        help="How the interfaces of this node's pods begin, for --detect-local-mode InterfaceNamePrefix.",
    ),
    click.option(
        "--nodeport-addresses",
        type=NODE_PORT_ADDRESSES,
        metavar="CIDR,...|primary",
        default=DEFAULTS.nodeport_addresses,
        show_default="every address of the node",
        help="Where NodePorts are served; primary is what the Node object names.",
    ),
)
CONNTRACK = together(
    click.option(
        "--conntrack-max-per-core",
        type=click.IntRange(min=0),
        show_default="32768 in kube-proxy's place, else 0",
        help="Connections that conntrack is to have room for, times cores; 0 leaves alone what there is.",
    ),
    click.option(
        "--conntrack-min",
        type=click.IntRange(min=0),
        show_default="131072 in kube-proxy's place, else 0",
        help="At least for so many, however few cores there are; nothing without the one before.",
    ),
    click.option(
        "--conntrack-tcp-timeout-established",
        "conntrack_tcp_timeout_established_s",
        type=SECONDS,
        show_default="24h in kube-proxy's place, else 0",
        help="Until conntrack forgets idle TCP connections; 0 leaves alone what is set.",
    ),
    click.option(
        "--conntrack-tcp-timeout-close-wait",
        "conntrack_tcp_timeout_close_wait_s",
        type=SECONDS,
        show_default="1h in kube-proxy's place, else 0",
        help="The same for half-closed ones.",
    ),
    click.option(
        "--conntrack-tcp-be-liberal",
        is_flag=True,
        help="Have conntrack let TCP packets outside of the window pass.",
    ),
    click.option(
        "--conntrack-udp-timeout",
        "conntrack_udp_timeout_s",
        type=SECONDS,
        default=shown(DEFAULTS.conntrack_udp_timeout_s),
        show_default=True,
        help="Until conntrack forgets UDP flows without an answer; 0 leaves alone what is set.",
    ),
    click.option(
        "--conntrack-udp-timeout-stream",
        "conntrack_udp_timeout_stream_s",
        type=SECONDS,
        default=shown(DEFAULTS.conntrack_udp_timeout_stream_s),
        show_default=True,
        help="The same for answered ones.",
    ),
)
