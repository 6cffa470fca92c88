"""Virtual servers of ipvs and the device of their addresses, line by line."""

from __future__ import annotations

import pytest

from tests.modes.redirect_cases import UDP, name
from userspace_proxy.explain.lines import Line
from userspace_proxy.model.endpoint import Address
from userspace_proxy.model.service import Portal, ServicePort
from userspace_proxy.modes.ipvs.device import device_lines
from userspace_proxy.modes.ipvs.rules import server_lines
from userspace_proxy.modes.ipvs.table import VirtualServerSpec
from userspace_proxy.modes.portal_names import PortalNames

WEB = ServicePort(name("shop/web:http"), 80, ("10.96.0.1", "fd00:96::1"), node_port=30_080)
DNS = ServicePort(name("kube-system/dns", UDP), 53, ("10.96.0.10",))
KNOWN = PortalNames((WEB, DNS))
ENDPOINT: Address = ("10.244.0.2", 8080)
FLAG = " flag-3 marks it as ours; no scheduler reads it."
ROUND_ROBIN = "each new connection goes to the next endpoint (rr: round robin)."


@pytest.mark.parametrize(
    ("service_port", "ip", "port", "server", "line", "reason"),
    [
        (
            WEB,
            "10.96.0.1",
            80,
            VirtualServerSpec(),
            "-A -t 10.96.0.1:80 -s rr -b flag-3",
            f"A virtual server for the cluster IP 10.96.0.1:80 (TCP): {ROUND_ROBIN}{FLAG}",
        ),
        (
            DNS,
            "10.96.0.10",
            53,
            VirtualServerSpec(),
            "-A -u 10.96.0.10:53 -s rr -b flag-3",
            f"A virtual server for the cluster IP 10.96.0.10:53 (UDP): {ROUND_ROBIN}{FLAG}",
        ),
        (
            WEB,
            "fd00:96::1",
            80,
            VirtualServerSpec(affinity_timeout_s=10_800),
            "-A -t [fd00:96::1]:80 -s rr -p 10800 -b flag-3",
            f"A virtual server for the cluster IP [fd00:96::1]:80 (TCP): {ROUND_ROBIN} Affinity: a client keeps its "
            f"endpoint until it has been silent for 10800 s (-p: persistent).{FLAG}",
        ),
        (
            WEB,
            "192.168.50.1",
            30_080,
            VirtualServerSpec("sh"),
            "-A -t 192.168.50.1:30080 -s sh -b sh-fallback,flag-3",
            "A virtual server for the node port 192.168.50.1:30080 (TCP): a hash of the client's address chooses the "
            f"endpoint (sh).{FLAG}",
        ),
        (
            WEB,
            "10.96.0.1",
            80,
            VirtualServerSpec(weights={ENDPOINT: 1}),
            "-a -t 10.96.0.1:80 -r 10.244.0.2:8080 -m -w 1",
            "10.244.0.2:8080 is an endpoint of the cluster IP 10.96.0.1:80 (TCP). Its address and port replace the "
            "packet's destination (-m: masquerading, which is NAT); weight 1: its share, with schedulers that use "
            "weights.",
        ),
        (
            WEB,
            "10.96.0.1",
            80,
            VirtualServerSpec(weights={ENDPOINT: 0}),
            "-a -t 10.96.0.1:80 -r 10.244.0.2:8080 -m -w 0",
            "10.244.0.2:8080 is an endpoint of the cluster IP 10.96.0.1:80 (TCP). Its address and port replace the "
            "packet's destination (-m: masquerading, which is NAT); weight 0: it gets no new connections, and "
            "open ones continue.",
        ),
    ],
)
def test_a_line_has_its_effect_and_its_service(
    service_port: ServicePort, ip: str, port: int, server: VirtualServerSpec, line: str, reason: str
) -> None:
    lines = list(server_lines(Portal(ip, port, service_port.name.protocol), server, service_port.name))

    assert Line.of(lines[-1], KNOWN) == (line, reason, str(service_port.name))


def test_the_device_and_its_addresses_are_explained() -> None:
    lines = [Line.of(line, KNOWN) for line in device_lines(set(), ["10.96.0.1", "fd00:96::1"], is_new=True)]

    assert [(line.text, line.explanation) for line in lines] == [
        (
            "link add kube-ipvs0 up group 10777 type dummy",
            "A dummy device, kube-ipvs0, which only holds the addresses of Services. kube-proxy has one of the same "
            "name; the group marks this one as ours.",
        ),
        (
            "address replace 10.96.0.1/32 dev kube-ipvs0",
            "Make 10.96.0.1 an address of this node, so that packets to it reach INPUT, where IPVS handles them.",
        ),
        (
            "address replace fd00:96::1/128 nodad dev kube-ipvs0",
            "Make fd00:96::1 an address of this node, so that packets to it reach INPUT, where IPVS handles them. "
            "nodad: do not ask other hosts whether they have it.",
        ),
    ]
