"""The table: Services, and the results that their clients must get. One group for each section of what a kube-proxy
must do.

Where kube-proxy's modes differ, one of the two is followed: docs/reference/contract.md says which.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.net.contract.cluster import BALANCER, OTHER_DNS, OTHER_WEB, PROXIED_WEB
from tests.net.contract.probes import Probe, probes
from tests.net.contract.services import PORTS, Given, endpoint_slice

DUAL = (4, 6)
PORTALS = "clusterIP,nodePort,vip,externalIP"
EXTERNAL = "nodePort,nodePort@alternate,vip,externalIP"
ALL = "caller,node-1,outside"
INTERNAL_LOCAL = {"internalTrafficPolicy": "Local"}
EXTERNAL_LOCAL = {"externalTrafficPolicy": "Local"}
BOTH_LOCAL = INTERNAL_LOCAL | EXTERNAL_LOCAL
LB = "LoadBalancer"

CASES: list[tuple[Given, tuple[str, ...]]] = []


def case(name: str, *slices: str, expect: tuple[str, ...], **fields: Any) -> None:
    CASES.append((Given(name, slices, number=len(CASES) + 1, **fields), expect))


def every_probe() -> Iterator[Probe]:
    for given, lines in CASES:
        yield from probes(given, *lines)


# ---- 1. Which objects count

case(
    "s1-headless",
    "local1",
    spec={"clusterIP": "None", "clusterIPs": ["None"], "externalIPs": ["198.51.100.1"]},
    expect=("caller,outside externalIP -> timeout",),
)
case(
    "s1-external-name",
    "local1",
    spec={"type": "ExternalName", "externalName": "example.org"},
    expect=("caller,outside clusterIP -> timeout",),
)
case(
    "s2-left-to-another-proxy",
    "local1",
    type=LB,
    labels={"service.kubernetes.io/service-proxy-name": "another"},
    expect=("caller,outside clusterIP,vip,externalIP -> timeout", "outside,node-1 nodePort -> refused"),
)
case(
    "s2-left-to-another-proxy-by-an-empty-name",
    "local1",
    labels={"service.kubernetes.io/service-proxy-name": ""},
    expect=("caller clusterIP -> timeout",),
)
case(
    "s3-slice-for-no-proxy",
    "local1",
    more=(
        endpoint_slice(
            "s3-slice-for-no-proxy",
            "headless",
            "local2",
            labels={
                "kubernetes.io/service-name": "s3-slice-for-no-proxy",
                "service.kubernetes.io/headless": "",
            },
        ),
    ),
    expect=("caller clusterIP -> local1",),
)
case(
    "s4-slices-of-others",
    "local1",
    more=(
        endpoint_slice("s4-slices-of-others", "unlabelled", "local2", labels={}),
        endpoint_slice("s4-slices-of-others", "empty", "local2", labels={"kubernetes.io/service-name": ""}),
        endpoint_slice("s4-slices-of-others", "fqdn", "local2") | {"addressType": "FQDN"},
    ),
    expect=("caller clusterIP -> local1",),
)
case(
    "s5-single-stack-4",
    "local1",
    more=(endpoint_slice("s5-single-stack-4", "ipv6", "local2", 6),),
    expect=("caller,outside clusterIP -> local1",),
)
case(
    "s5-single-stack-6",
    "local1",
    type=LB,
    families=(6,),
    more=(endpoint_slice("s5-single-stack-6", "ipv4", "local2", 4),),
    expect=(f"{ALL} {PORTALS} -> local1",),
)
case("s5-dual-stack", "local1 remote1", type=LB, families=DUAL, expect=(f"{ALL} {PORTALS} -> local1 remote1",))
case(
    "s5-dual-stack-with-endpoints-in-one-family",
    type=LB,
    families=DUAL,
    more=(endpoint_slice("s5-dual-stack-with-endpoints-in-one-family", "ipv4", "local1"),),
    expect=(f"{ALL} {PORTALS}/4 -> local1", f"{ALL} {PORTALS}/6 -> refused"),
)
case(
    "s5-old-object-without-families",
    "local1",
    spec={"clusterIPs": None, "ipFamilies": None, "ipFamilyPolicy": None},
    expect=("caller clusterIP -> local1",),
)
case(
    "s6-by-name-not-by-number",
    "local1",
    ports=({"name": "b", "port": 80}, {"name": "a", "port": 81}),
    targets={"a": OTHER_WEB, "b": 8080, "": 1, "c": 2},
    expect=("caller clusterIP/tcp -> local1", "caller clusterIP:81/tcp -> local1-2"),
)
case(
    "s6-incomplete-slices",
    "local1",
    more=(
        endpoint_slice("s6-incomplete-slices", "no-port", "local2") | {"ports": [{"name": "web", "port": None}]},
        endpoint_slice("s6-incomplete-slices", "zero", "local2") | {"ports": [{"name": "web", "port": 0}]},
        endpoint_slice("s6-incomplete-slices", "null", "local2") | {"ports": None},
        endpoint_slice("s6-incomplete-slices", "none", "") | {"endpoints": None},
        endpoint_slice("s6-incomplete-slices", "first-only", "")
        | {"endpoints": [{"addresses": []}, {"addresses": ["10.244.0.13", "10.244.0.14"]}]},
    ),
    expect=("caller clusterIP -> local1 local2",),
)
case(
    "s9-several-slices",
    "local1 local2",
    "local2 remote1",
    "remote2:unready",
    expect=("caller,outside clusterIP -> local1 local2 remote1",),
)
case("s9-same-address-twice", "local1:gone", "local1", "local1:leaving", expect=("caller clusterIP -> local1",))

# ---- 2. Which endpoints

case("c1-unstated-conditions", "local1:unstated remote1:unstated", expect=("caller clusterIP -> local1 remote1",))
case(
    "c1-ready-though-not-serving",
    "local1",
    more=(
        endpoint_slice("c1-ready-though-not-serving", "ready", "")
        | {"endpoints": [{"addresses": ["10.244.0.13"], "conditions": {"ready": True, "serving": False}}]},
    ),
    expect=("caller clusterIP -> local1 local2",),
)
case(
    "c2-ready-before-leaving",
    "local1 local2:leaving local3:gone local4:serving remote1 remote2:unready",
    type=LB,
    expect=(f"{ALL} {PORTALS} -> local1 remote1",),
)
case(
    "c2-leaving-where-none-is-ready",
    "local1:leaving local2:gone local3:serving remote1:leaving remote2:unready",
    type=LB,
    expect=(f"{ALL} {PORTALS} -> local1 remote1",),
)
case(
    "c2a-short-circuit-takes-the-cluster-set",
    "local1:leaving remote1",
    type=LB,
    spec=EXTERNAL_LOCAL,
    expect=(
        f"outside {EXTERNAL} -> local1",
        f"caller,node-1 {EXTERNAL} -> remote1",
        f"{ALL} clusterIP -> remote1",
    ),
)
case(
    "c3-each-set-falls-back-for-itself",
    "local1:leaving local2:gone remote1",
    type=LB,
    spec=BOTH_LOCAL,
    expect=(
        f"outside {EXTERNAL} -> local1",
        f"caller,node-1 {EXTERNAL} -> remote1",
        f"{ALL} clusterIP -> local1",
    ),
)
case("c4-serving-is-not-enough", "local1:serving remote1:gone", type=LB, expect=(f"{ALL} {PORTALS} -> refused",))
case(
    "c5-external-policy-without-external-address",
    "local1 remote1",
    spec=EXTERNAL_LOCAL,
    expect=(f"{ALL} clusterIP -> local1 remote1",),
)
case(
    "c5-external-policy-of-external-ips",
    "local1 remote1",
    spec=EXTERNAL_LOCAL | {"externalIPs": ["198.51.100.240"]},
    expect=("caller,node-1 clusterIP -> local1 remote1",),
)
case(
    "c8-terminating-elsewhere-only",
    "remote1:leaving",
    type=LB,
    spec=BOTH_LOCAL,
    expect=(
        f"{ALL} clusterIP -> timeout",
        "outside nodePort,vip,externalIP -> timeout",
        "caller,node-1 nodePort,vip,externalIP -> remote1",
    ),
)
case(
    "c8-not-serving-at-all",
    "local1:gone remote1:unready",
    type=LB,
    spec=BOTH_LOCAL,
    expect=(f"{ALL} {PORTALS} -> refused",),
)

# topology: the proxy's node is in zone-a

case(
    "c6-own-zone",
    "local1:zone-a remote1:zone-b remote2:zone-a",
    type=LB,
    expect=(f"{ALL} {PORTALS} -> local1 remote2",),
)
case(
    "c6-local-sets-ignore-hints",
    "local1:zone-b local2:zone-a remote1:zone-a",
    type=LB,
    spec=BOTH_LOCAL,
    expect=(f"{ALL} clusterIP -> local1 local2", "outside nodePort,vip -> local1 local2"),
)
case(
    "c6-internal-local-ignores-hints",
    "local1:zone-b local2:zone-a remote1:zone-a remote2:zone-b",
    type="NodePort",
    spec=INTERNAL_LOCAL,
    expect=("caller clusterIP -> local1 local2", f"{ALL} nodePort -> local2 remote1"),
)
case(
    "c6-external-local-ignores-hints",
    "local1:zone-b local2:zone-a remote1:zone-a remote2:zone-b",
    type="NodePort",
    spec=EXTERNAL_LOCAL,
    expect=("outside nodePort -> local1 local2", "caller nodePort,clusterIP -> local2 remote1"),
)
case("c6-zone-without-endpoints", "local1:zone-b remote1:zone-c", expect=("caller clusterIP -> local1 remote1",))
case(
    "c6-one-without-hint", "local1:zone-a local2 remote1:zone-b", expect=("caller clusterIP -> local1 local2 remote1",)
)
case(
    "c6-hints-of-the-unready-do-not-matter",
    "local1:zone-a local2:unready remote1:zone-b remote2:leaving,zone-a",
    expect=("caller clusterIP -> local1",),
)
case(
    "c6-only-unready-in-own-zone",
    "local1:zone-a,unready remote1:zone-b remote2:zone-b",
    expect=("caller clusterIP -> remote1 remote2",),
)
case("c6-several-zones", "local1:zone-b,zone-a remote1:zone-c,zone-b", expect=("caller clusterIP -> local1",))
case(
    "c6-leaving-ones-have-no-zone",
    "local1:leaving,zone-a remote1:leaving,zone-b",
    expect=("caller clusterIP -> local1 remote1",),
)
case(
    "c6-own-node",
    "local1:node-1,zone-a local2:node-2,zone-a remote1:node-2,zone-b",
    expect=("caller clusterIP -> local1",),
)
case(
    "c6-some-without-node-hint",
    "local1:node-1 local2 remote1:node-2",
    expect=("caller clusterIP -> local1 local2 remote1",),
)
case(
    "c6-some-without-node-hint-in-zones",
    "local1:zone-b,node-1 local2:zone-a remote1:zone-a,node-2",
    expect=("caller clusterIP -> local2 remote1",),
)
case(
    "c6-none-for-this-node",
    "local1:node-2,zone-a remote1:node-2,zone-a remote2:node-2,zone-b",
    expect=("caller clusterIP -> local1 remote1",),
)
case(
    "c6-none-for-node-nor-zone",
    "local1:node-2,zone-b remote1:node-2,zone-b",
    expect=("caller clusterIP -> local1 remote1",),
)
case(
    "c6-topology-against-local",
    "local1:zone-b remote1:zone-a",
    type="NodePort",
    spec=EXTERNAL_LOCAL,
    expect=("outside nodePort -> local1", "caller clusterIP,nodePort -> remote1", "outside clusterIP -> remote1"),
)

# ---- 3. No endpoints

case(
    "n1-no-slice",
    type=LB,
    families=DUAL,
    expect=(
        f"{ALL} {PORTALS} -> refused",
        f"{ALL} nodePort@alternate -> refused",
        "node-1 nodePort@localhost -> refused",
    ),
)
case(
    "n1-unready-only",
    "local1:unready remote1:unready",
    type=LB,
    spec=EXTERNAL_LOCAL,
    expect=(f"{ALL} {PORTALS} -> refused",),
)
case(
    "n2-internal-local-without-local",
    "remote1 local1:unready",
    type=LB,
    spec=INTERNAL_LOCAL,
    families=DUAL,
    expect=(f"{ALL} clusterIP -> timeout", f"{ALL} {EXTERNAL} -> remote1"),
)
case(
    "n2-external-local-without-local",
    "remote1 local1:unready",
    type=LB,
    spec=EXTERNAL_LOCAL,
    families=DUAL,
    expect=(
        f"outside {EXTERNAL} -> timeout",
        f"caller,node-1 {EXTERNAL} -> remote1",
        f"{ALL} clusterIP -> remote1",
        "node-1 nodePort@localhost -> remote1",
    ),
)
case("n3-another-port-of-a-live-cluster-ip", "local1", expect=("caller,outside clusterIP:4444 -> timeout",))

# ---- 4. Policies, and whom backends see

case(
    "m-cluster",
    "local1 remote1",
    type=LB,
    families=DUAL,
    expect=(
        "caller clusterIP -> local1 remote1 as own",
        f"caller {EXTERNAL} -> local1 remote1 as node",
        f"node-1 clusterIP,nodePort@localhost,{EXTERNAL} -> local1 remote1 as node",
        f"outside clusterIP,{EXTERNAL} -> local1 remote1 as node",
    ),
)
case(
    "m-external-local",
    "local1 remote1",
    type=LB,
    spec=EXTERNAL_LOCAL,
    families=DUAL,
    expect=(
        f"caller clusterIP,{EXTERNAL} -> local1 remote1 as own",
        f"node-1 clusterIP,nodePort@localhost,{EXTERNAL} -> local1 remote1 as node",
        "outside clusterIP -> local1 remote1 as node",
        f"outside {EXTERNAL} -> local1 as own",
    ),
)
case(
    "m-internal-local",
    "local1 remote1",
    type=LB,
    spec=INTERNAL_LOCAL,
    families=DUAL,
    expect=(
        "caller clusterIP -> local1 as own",
        "node-1,outside clusterIP -> local1 as node",
        f"{ALL} {EXTERNAL} -> local1 remote1 as node",
    ),
)
case(
    "m-both-local",
    "local1 remote1",
    type=LB,
    spec=BOTH_LOCAL,
    expect=(
        "caller clusterIP -> local1 as own",
        "node-1,outside clusterIP -> local1 as node",
        f"caller {EXTERNAL} -> local1 remote1 as own",
        f"node-1 {EXTERNAL} -> local1 remote1 as node",
        f"outside {EXTERNAL} -> local1 as own",
    ),
)
case(
    "m-hairpin",
    "local1 remote1",
    type=LB,
    spec=EXTERNAL_LOCAL,
    families=DUAL,
    expect=("local1 clusterIP -> local1 remote1 as own", "local1 nodePort,vip,externalIP -> local1 remote1 as own"),
)
case("m-hairpin-alone", "local1", type=LB, families=DUAL, expect=(f"local1 {PORTALS} -> local1 as node",))
case("m-host-network", "node-1 remote1", type=LB, expect=(f"{ALL} {PORTALS} -> node-1 remote1",))
case(
    "m-source-node",
    "local1 remote1",
    type=LB,
    spec=EXTERNAL_LOCAL,
    annotations={"userspace-proxy/source-ip": "node"},
    expect=("caller clusterIP -> local1 remote1 as node", "outside nodePort,vip,externalIP -> local1 as node"),
)
case(
    "m-source-transparent",
    "local1 remote1",
    type=LB,
    spec=EXTERNAL_LOCAL,
    annotations={"userspace-proxy/source-ip": "transparent"},
    expect=(
        "caller clusterIP -> local1 remote1 as own",
        "outside nodePort,vip,externalIP -> local1 as own",
        "outside clusterIP -> local1 remote1 as node",
    ),
)
for _version in ("v1", "v2"):
    case(
        f"m-source-proxy-protocol-{_version}",
        "local1 remote1",
        type=LB,
        families=DUAL,
        annotations={"userspace-proxy/source-ip": f"proxy-protocol-{_version}"},
        ports=PORTS[:1],
        targets={"web": PROXIED_WEB},
        expect=("caller,outside clusterIP,nodePort,vip,externalIP/tcp -> local1 remote1 as own",),
    )

_TERMINATING = (
    ("some-ready", "local1 local2 local3:leaving local4:gone remote1", "local1 local2 remote1", "local1 local2"),
    ("some-leave-here", "local1:leaving local2:leaving local3:gone remote1", "remote1", "local1 local2"),
    ("some-leave-there", "remote1:leaving", "remote1", "timeout"),
    ("all-leave", "local1:leaving remote1:leaving", "local1 remote1", "local1"),
    ("all-gone", "local1:gone remote1:gone", "refused", "refused"),
    ("all-removed", "", "refused", "refused"),
)
for _name, _endpoints, _cluster, _local in _TERMINATING:
    _as_own, _as_node = ("", "") if _cluster == "refused" else (" as own", " as node")
    case(
        f"t-{_name}-external-local",
        _endpoints,
        type=LB,
        spec=EXTERNAL_LOCAL,
        expect=(
            f"caller clusterIP -> {_cluster}{_as_own}",
            f"outside nodePort,vip -> {_local}" + (_as_own if _local != "timeout" else ""),
        ),
    )
    case(
        f"t-{_name}-external-cluster",
        _endpoints,
        type=LB,
        expect=(f"caller clusterIP -> {_cluster}{_as_own}", f"outside nodePort,vip -> {_cluster}{_as_node}"),
    )

# ---- 5. Node ports, load balancers, external IPs

case(
    "p1-every-local-address",
    "local1",
    type="NodePort",
    families=DUAL,
    expect=(
        f"{ALL} nodePort,nodePort@alternate -> local1",
        "caller nodePort@gateway -> local1",
        "node-1 nodePort@localhost -> local1 as node",
    ),
)
case(
    "p2-two-ports-on-two-node-ports",
    "local1",
    type="NodePort",
    ports=(
        {"name": "web", "port": 80, "nodePort": 31001},
        {"name": "dns", "port": 53, "protocol": "UDP", "nodePort": 31002},
    ),
    expect=(
        f"{ALL} nodePort:31001/tcp -> local1",
        f"{ALL} nodePort:31002/udp -> local1",
        "outside nodePort:31002/tcp -> refused",
        "outside nodePort:31001/udp -> refused",
        "caller clusterIP/tcp -> local1",
        "caller clusterIP:53/udp -> local1",
    ),
)
case(
    "p3-ip-mode-proxy",
    "local1",
    type=LB,
    spec={
        "externalIPs": None,
        "status": {
            "loadBalancer": {"ingress": [{"ip": BALANCER[4], "ipMode": "Proxy"}, {"hostname": "lb.example.org"}]}
        },
    },
    expect=(f"{ALL} nodePort -> local1", "caller,node-1 balancer -> balancer"),
)
case(
    "p3-ip-mode-vip",
    "local1",
    type=LB,
    spec={"status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.251", "ipMode": "VIP"}, {"ip": "203.0.113.252"}]}}},
    expect=(f"{ALL} vip@251,vip@252 -> local1",),
)
_RANGES = "loadBalancerSourceRanges"
case(
    "p4-from-within",
    "local1",
    type=LB,
    spec={_RANGES: ["192.0.2.0/24"]},
    expect=(
        "outside vip -> local1 as node",
        "caller,node-1 vip -> timeout",
        f"{ALL} clusterIP,nodePort,externalIP -> local1",
    ),
)
case(
    "p4-from-outside",
    "local1",
    type=LB,
    spec={_RANGES: ["192.0.3.0/24", " 10.244.0.0/16 "]},
    expect=("outside,node-1 vip -> timeout", "caller vip -> local1", "outside clusterIP,nodePort,externalIP -> local1"),
)
case(
    "p4-the-node-within",
    "local1",
    type=LB,
    spec={_RANGES: ["192.168.50.0/24"]},
    expect=("node-1 vip -> local1", "caller,outside vip -> timeout"),
)
case(
    "p4-local-policy",
    "local1 remote1",
    type=LB,
    spec=EXTERNAL_LOCAL | {_RANGES: ["192.0.2.9/32"]},
    expect=("outside vip -> local1 as own", "caller,node-1 vip -> timeout", "outside nodePort -> local1"),
)
case("p4-everybody", "local1", type=LB, spec={_RANGES: ["192.0.3.0/24", "0.0.0.0/0"]}, expect=(f"{ALL} vip -> local1",))
case(
    "p4-ranges-of-both-families",
    "local1",
    type=LB,
    families=DUAL,
    spec={_RANGES: ["192.0.2.0/24", "fd00:2::/64"]},
    expect=("outside vip -> local1", "caller vip -> timeout", "caller,outside nodePort -> local1"),
)
case(
    "p4-ranges-of-one-family",
    "local1",
    type=LB,
    families=DUAL,
    spec={_RANGES: ["192.0.2.0/24"]},
    expect=("outside vip/4 -> local1", "caller vip/4 -> timeout", "caller,outside,node-1 vip/6 -> timeout"),
)
case(
    "p4-without-endpoints",
    type=LB,
    spec={_RANGES: ["192.0.2.0/24"]},
    expect=(
        "outside vip -> refused",
        "caller vip -> timeout",
        "caller,outside nodePort,externalIP,clusterIP -> refused",
    ),
)
case(
    "p4-of-a-node-port-service-means-nothing",
    "local1",
    type="NodePort",
    spec={_RANGES: ["192.0.3.0/24"]},
    expect=("outside nodePort,clusterIP -> local1",),
)
case(
    "p5-external-ip-of-a-cluster-ip-service",
    "local1 remote1",
    spec={"externalIPs": ["198.51.100.250"]},
    expect=(f"{ALL} externalIP@250 -> local1 remote1 as node", "caller clusterIP -> local1 remote1 as own"),
)
case(
    "p5-external-ip-local",
    "local1 remote1",
    spec={"externalIPs": ["198.51.100.251"], "externalTrafficPolicy": "Local"},
    expect=(
        "outside externalIP@251 -> local1 as own",
        "caller externalIP@251 -> local1 remote1 as own",
        "node-1 externalIP@251 -> local1 remote1 as node",
    ),
)
case(
    "p6-no-node-port",
    "local1",
    type=LB,
    spec={"allocateLoadBalancerNodePorts": False},
    ports=tuple(dict(port, nodePort=0) for port in PORTS),
    expect=(f"{ALL} vip,externalIP,clusterIP -> local1", "outside,node-1 nodePort -> refused"),
)
case(
    "p7-zeros-in-front",
    "local1",
    spec={"clusterIP": "010.096.001.253", "clusterIPs": ["010.096.001.253"], "externalIPs": ["198.051.100.252"]},
    expect=("caller clusterIP@253 -> local1", "outside externalIP@252 -> local1"),
)
case(
    "p-sctp-beside-others",
    "local1",
    type=LB,
    ports=(*PORTS, {"name": "signal", "port": 81, "protocol": "SCTP", "nodePort": 31003}),
    expect=(f"{ALL} {PORTALS} -> local1",),
)
case(
    "p-only-one-protocol",
    "local1",
    type="NodePort",
    ports=PORTS[:1],
    expect=(f"{ALL} clusterIP,nodePort/tcp -> local1", "outside nodePort/udp -> refused"),
)
case(
    "p-other-targets",
    "local1 remote1",
    type=LB,
    targets={"web": OTHER_WEB, "dns": OTHER_DNS},
    expect=(f"{ALL} {PORTALS} -> local1-2 remote1-2",),
)
