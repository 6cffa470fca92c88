"""Services as a kernel mode gets them, in a short notation."""

from __future__ import annotations

import random
from collections.abc import Iterable

from tests.modes.redirect_cases import TCP, UDP, name
from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.redirects import PodDetector
from userspace_proxy.model.service import ServicePort, load_balancer_portals
from userspace_proxy.model.topology import Node, serving_endpoints
from userspace_proxy.modes.kernel_rules import Translation
from userspace_proxy.modes.plans import allowed_to_dial, plan

HERE = Node("here", addresses=("192.168.50.1", "fd00:50::1"))
PODS = PodDetector(cidrs=("10.244.0.0/24", "fd00:244::/64"))
NEAR4, NEAR6 = Endpoint("10.244.0.2", 8080, node_name="here"), Endpoint("fd00:244::2", 8080, node_name="here")
FAR4, FAR6 = Endpoint("10.244.1.2", 8080, node_name="there"), Endpoint("fd00:244:0:1::2", 8080, node_name="there")
ALL = (NEAR4, NEAR6, FAR4, FAR6)


def translation(service_port: ServicePort, *endpoints: Endpoint, detects_pods: bool = True) -> Translation:
    planned = plan(service_port, endpoints, HERE, detects_pods=detects_pods, in_kernel=True)
    portals = load_balancer_portals(service_port) if service_port.source_ranges else ()
    allowed = {portal: allowed_to_dial(service_port, portal, HERE) for portal in portals}
    return Translation(service_port, planned.routes, planned.reaches, allowed, serving_endpoints(endpoints))


def by_name(translations: Iterable[Translation]) -> dict[ServicePortName, Translation]:
    return {made.service_port.name: made for made in translations}


WEB = ServicePort(
    name("shop/web:http"),
    80,
    ("10.96.0.1", "fd00:96::1"),
    node_port=30_080,
    external_ips=("203.0.113.7", "fd00:cb::7"),
    affinity_timeout_s=600,
    load_balancer_ips=("198.51.100.1", "fd00:c6::1"),
    source_ranges=("192.168.0.0/16", "fd00:50::/64", "10.1.0.0/16"),
)
DNS = ServicePort(name("kube-system/kube-dns:dns", UDP), 53, ("10.96.0.10", "fd00:96::a"))
LOCAL = ServicePort(
    name("shop/local"),
    80,
    ("10.96.0.2", "fd00:96::2"),
    node_port=30_081,
    external_ips=("203.0.113.8",),
    load_balancer_ips=("198.51.100.2",),
    internal_local=True,
    external_local=True,
    health_check_node_port=31_000,
)
ELSEWHERE = ServicePort(
    name("shop/elsewhere", UDP),
    53,
    ("10.96.0.3", "fd00:96::3"),
    node_port=30_053,
    load_balancer_ips=("198.51.100.3", "fd00:c6::3"),
    internal_local=True,
    external_local=True,
)
NOBODY = ServicePort(
    name("shop/nobody"), 80, ("10.96.0.4", "fd00:96::4"), node_port=30_084, load_balancer_ips=("198.51.100.4",)
)
EVERYTHING = by_name(
    (
        translation(WEB, *ALL),
        translation(DNS, NEAR4, FAR6),
        translation(LOCAL, *ALL),
        translation(ELSEWHERE, FAR4, FAR6),
        translation(NOBODY),
    )
)


def any_translation(chance: random.Random, number: int) -> Translation:
    """Return some state of the Service with this *number*."""
    made = ServicePort(
        name(f"ns/s{number}:p", chance.choice((TCP, UDP)) if number % 2 else TCP),
        chance.choice((80, 443)),
        (f"10.96.1.{number}", f"fd00:96::1:{number}"),
        node_port=chance.choice((0, 30_000 + number)),
        external_ips=chance.choice(((), (f"203.0.113.{number}", f"fd00:cb::{number}"))),
        affinity_timeout_s=chance.choice((None, 30, 10_800)),
        load_balancer_ips=chance.choice(((), (f"198.51.100.{number}",))),
        source_ranges=chance.choice(((), ("192.168.0.0/16",), ("0.0.0.0/0",), ("fd00::/16",))),
        internal_local=chance.random() < 0.3,
        external_local=chance.random() < 0.3,
    )
    return translation(made, *chance.sample(ALL, chance.randrange(len(ALL) + 1)))
