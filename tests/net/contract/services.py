"""Services and their EndpointSlices in a line or two, with all stated that a control plane would have filled in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tests.net.contract.cluster import ADDRESSES, DNS, NODE, NODE_OF, WEB

# TCP and UDP at one port number, so that they can share a node port, too.
PORTS = ({"name": "web", "port": 80, "protocol": "TCP"}, {"name": "dns", "port": 80, "protocol": "UDP"})
TARGETS = {"web": WEB, "dns": DNS}
# The words for an endpoint's conditions: ready, serving, terminating.
_CONDITIONS = {
    "unready": (False, False, False),
    "serving": (False, True, False),
    "leaving": (False, True, True),
    "gone": (False, False, True),
}
_FAMILY = {4: "IPv4", 6: "IPv6"}


@dataclass(frozen=True, eq=False)
class Given:
    """One Service. A NodePort has a node port; a LoadBalancer a VIP and an external IP, too.

    ``slices``: the endpoints of each EndpointSlice, in words such as ``local1:leaving remote1:zone-a,node-1``: the
    place, its conditions (ready, unless one of unready, serving, leaving, gone, unstated says otherwise) and the zones
    and nodes that its hints name.
    """

    name: str
    slices: tuple[str, ...] = ()
    type: str = "ClusterIP"
    spec: Mapping[str, Any] = field(default_factory=dict)
    families: tuple[int, ...] = (4,)
    ports: tuple[Mapping[str, Any], ...] = PORTS
    targets: Mapping[str, int] = field(default_factory=lambda: TARGETS)
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    more: tuple[Mapping[str, Any], ...] = ()
    number: int = 0

    def but(self, **changes: Any) -> Given:
        return replace(self, **changes)

    # ---- where it is found

    def cluster_ip(self, family: int) -> str:
        return f"10.96.1.{self.number}" if family == 4 else f"fd00:96::1:{self.number:x}"

    def vip(self, family: int) -> str:
        return f"203.0.113.{self.number}" if family == 4 else f"fd00:203::1:{self.number:x}"

    def external_ip(self, family: int) -> str:
        return f"198.51.100.{self.number}" if family == 4 else f"fd00:198::1:{self.number:x}"

    @property
    def node_port(self) -> int:
        return 30_000 + self.number

    # ---- as the API has it

    def objects(self) -> list[Mapping[str, Any]]:
        return [self._service(), *self._slices(), *self.more]

    def manifest(self) -> str:
        return "---\n".join(json.dumps(given, indent=1) + "\n" for given in self.objects())

    def _service(self) -> dict[str, Any]:
        cluster_ips = [self.cluster_ip(family) for family in self.families]
        ports = [dict(port) for port in self.ports]
        spec: dict[str, Any] = {
            "type": self.type,
            "clusterIP": cluster_ips[0],
            "clusterIPs": cluster_ips,
            "ipFamilies": [_FAMILY[family] for family in self.families],
            "ipFamilyPolicy": "SingleStack" if len(self.families) == 1 else "RequireDualStack",
            "internalTrafficPolicy": "Cluster",
            "ports": ports,
        }
        status: dict[str, Any] = {}
        if self.type in ("NodePort", "LoadBalancer"):
            spec["externalTrafficPolicy"] = "Cluster"
            for port in ports:
                port.setdefault("nodePort", self.node_port)
        if self.type == "LoadBalancer":
            spec["externalIPs"] = [self.external_ip(family) for family in self.families]
            status = {"loadBalancer": {"ingress": [{"ip": self.vip(family)} for family in self.families]}}
        given = dict(self.spec)
        status = given.pop("status", status)
        metadata = {"namespace": "default", "name": self.name, "labels": dict(self.labels)}
        metadata["annotations"] = dict(self.annotations)
        return {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec | given, "status": status}

    def _slices(self) -> list[dict[str, Any]]:
        return [
            endpoint_slice(self.name, f"{_FAMILY[family].lower()}-{index}", words, family, self.targets)
            for index, words in enumerate(self.slices)
            for family in self.families
        ]


def endpoint_slice(
    service: str,
    suffix: str,
    words: str,
    family: int = 4,
    targets: Mapping[str, int] = TARGETS,
    labels: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Return the EndpointSlice with the endpoints that *words* describe."""
    protocols = {"web": "TCP", "dns": "UDP"}
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "namespace": "default",
            "name": f"{service}-{suffix}",
            "labels": {"kubernetes.io/service-name": service} if labels is None else dict(labels),
        },
        "addressType": _FAMILY[family],
        "ports": [
            {"name": name, "port": port, "protocol": protocols.get(name, "TCP")} for name, port in targets.items()
        ],
        "endpoints": [_endpoint(word, family) for word in words.split()],
    }


def _endpoint(word: str, family: int) -> dict[str, Any]:
    name, _, said = word.partition(":")
    marks = said.split(",") if said else []
    stated = next((_CONDITIONS[mark] for mark in marks if mark in _CONDITIONS), (True, True, False))
    conditions = dict(zip(("ready", "serving", "terminating"), stated, strict=True))
    hints = {
        "forZones": [{"name": mark} for mark in marks if mark.startswith("zone-")],
        "forNodes": [{"name": mark} for mark in marks if mark.startswith("node-")],
    }
    return {
        "addresses": [ADDRESSES[name][family]],
        "conditions": {} if "unstated" in marks else conditions,
        "nodeName": NODE_OF[name],
        "hints": {key: value for key, value in hints.items() if value} or None,
    }


def node_object(zone: str | None = "zone-a") -> dict[str, Any]:
    labels = {"kubernetes.io/hostname": NODE}
    if zone is not None:
        labels["topology.kubernetes.io/zone"] = zone
    addresses = [{"type": "InternalIP", "address": ip} for ip in ("192.168.50.1", "fd00:50::1")]
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": NODE, "labels": labels},
        "spec": {"podCIDR": "10.244.0.0/24", "podCIDRs": ["10.244.0.0/24", "fd00:244::/64"]},
        "status": {"addresses": addresses, "conditions": [{"type": "Ready", "status": "True"}]},
    }
