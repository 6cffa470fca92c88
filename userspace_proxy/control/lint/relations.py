"""What the API server refuses of fields beside each other, each of which by itself is right. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from userspace_proxy.control import decode
from userspace_proxy.control.lint.api_rules import values_at
from userspace_proxy.control.pools import NODE_PORTS
from userspace_proxy.errors import ConfigError, Note

_Plain = Mapping[str, Any]

_ENDPOINTS_MAX = 1_000
_ADDRESSES_MAX = 100
_HINTS_MAX = 8


class Relation(NamedTuple):
    """What one field of a spec must not be beside others. ``wrong``: what a spec must say to be refused."""

    field: str
    demand: str
    wrong: _Plain
    is_wrong: Callable[[_Plain], object]
    mend: str


def _type(spec: _Plain) -> str:
    return spec.get("type") or "ClusterIP"


def _cluster_ips(spec: _Plain) -> list[Any]:
    return spec.get("clusterIPs") or [spec["clusterIP"]] if spec.get("clusterIP") else spec.get("clusterIPs") or []


def _has_node_port(spec: _Plain) -> bool:
    return any(port.get("nodePort") for port in spec.get("ports") or ())


def _is_dialled_from_outside(spec: _Plain) -> bool:
    return _type(spec) in ("NodePort", "LoadBalancer") or (_type(spec) == "ClusterIP" and bool(spec.get("externalIPs")))


def _is_single_stack(spec: _Plain) -> bool:
    """Return whether *spec* says SingleStack, or nothing, which means it unless the Service has no selector or IP."""
    is_dual_by_default = "None" in _cluster_ips(spec) and not spec.get("selector")
    return (spec.get("ipFamilyPolicy") or "SingleStack") == "SingleStack" and not is_dual_by_default


def _has_two_families(spec: _Plain) -> bool:
    return len(set(spec.get("ipFamilies") or ())) > 1 or len(set(_cluster_ips(spec)) - {"None"}) > 1


def _is_set_for_external_name(field: str, spec: _Plain) -> bool:
    return _type(spec) == "ExternalName" and bool(spec.get(field))


def _is_set_without_load_balancer(field: str, spec: _Plain) -> bool:
    return _type(spec) != "LoadBalancer" and (bool(spec.get(field)) or spec.get(field) is False)


_NAMED = {"type": "ExternalName", "externalName": "example.org"}

RELATIONS: tuple[Relation, ...] = (
    Relation(
        "spec.clusterIP",
        "a Service of type NodePort or LoadBalancer cannot be headless",
        {"clusterIP": "None", "type": "NodePort"},
        lambda s: "None" in _cluster_ips(s)[:1] and _type(s) in ("NodePort", "LoadBalancer"),
        "leave clusterIP out, or write 'type: ClusterIP'",
    ),
    Relation(
        "spec.clusterIPs",
        "None stands alone",
        {"clusterIP": "None", "clusterIPs": ["None", "10.96.0.9"]},
        lambda s: "None" in _cluster_ips(s) and len(_cluster_ips(s)) > 1,
        "write [None], or addresses alone",
    ),
    Relation(
        "spec.clusterIPs",
        "it stands beside clusterIP, and its first address is the same",
        {"clusterIPs": ["10.96.0.9"]},
        lambda s: s.get("clusterIPs") and not s.get("clusterIP") and _type(s) != "ExternalName",
        "add clusterIP with the first of these addresses",
    ),
    Relation(
        "spec.externalName",
        "a Service of type ExternalName names a host",
        {"type": "ExternalName"},
        lambda s: _type(s) == "ExternalName" and not s.get("externalName"),
        "add externalName, or write another type",
    ),
    *(
        Relation(
            f"spec.{field}",
            "a Service of type ExternalName has no addresses",
            {**_NAMED, field: wrong},
            partial(_is_set_for_external_name, field),
            "leave it out",
        )
        for field, wrong in (
            ("clusterIP", "10.96.0.9"),
            ("clusterIPs", ["10.96.0.9"]),
            ("ipFamilies", ["IPv4"]),
            ("ipFamilyPolicy", "SingleStack"),
        )
    ),
    Relation(
        "spec.ports[].nodePort",
        "a ClusterIP Service has no node ports",
        {"ports": [{"port": 80, "nodePort": 30080}]},
        lambda s: _type(s) == "ClusterIP" and _has_node_port(s),
        "write 'type: NodePort'",
    ),
    Relation(
        "spec.sessionAffinityConfig",
        "a Service without session affinity has no configuration of it",
        {"sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 10}}},
        lambda s: s.get("sessionAffinityConfig") is not None and s.get("sessionAffinity") != "ClientIP",
        "write 'sessionAffinity: ClientIP', or leave it out",
    ),
    Relation(
        "spec.ipFamilies",
        "each family stands once",
        {"ipFamilies": ["IPv4", "IPv4"]},
        lambda s: len(set(s.get("ipFamilies") or ())) < len(s.get("ipFamilies") or ()),
        "write IPv4 and IPv6, or one of them",
    ),
    Relation(
        "spec.ipFamilyPolicy",
        "SingleStack, the default, is one family and one address",
        {"ipFamilies": ["IPv4", "IPv6"]},
        lambda s: _is_single_stack(s) and _has_two_families(s),
        "write PreferDualStack, or keep one family and one address",
    ),
    *(
        Relation(
            f"spec.{field}",
            "it counts for Services of type LoadBalancer alone",
            {field: wrong},
            partial(_is_set_without_load_balancer, field),
            "write 'type: LoadBalancer', or leave it out",
        )
        for field, wrong in (
            ("loadBalancerSourceRanges", ["192.0.2.0/24"]),
            ("loadBalancerClass", "example.org/lb"),
            ("allocateLoadBalancerNodePorts", False),
            ("healthCheckNodePort", 31000),
        )
    ),
    Relation(
        "spec.healthCheckNodePort",
        "load balancers are told of endpoints only with externalTrafficPolicy: Local",
        {"type": "LoadBalancer", "healthCheckNodePort": 31000},
        lambda s: (
            s.get("healthCheckNodePort") and _type(s) == "LoadBalancer" and s.get("externalTrafficPolicy") != "Local"
        ),
        "write 'externalTrafficPolicy: Local', or leave it out",
    ),
    Relation(
        "spec.healthCheckNodePort",
        f"it is a number from {NODE_PORTS.start} to {NODE_PORTS.stop - 1}",
        {"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 8080},
        lambda s: s.get("healthCheckNodePort") and s["healthCheckNodePort"] not in NODE_PORTS,
        f"write a number from {NODE_PORTS.start} to {NODE_PORTS.stop - 1}, or leave it out",
    ),
    Relation(
        "spec.externalTrafficPolicy",
        "a Service without node ports and externalIPs has no clients from outside",
        {"externalTrafficPolicy": "Local"},
        lambda s: s.get("externalTrafficPolicy") and not _is_dialled_from_outside(s),
        "leave it out, or write 'type: NodePort'",
    ),
)


# What the functions below find, for the docs.
CONTRADICTIONS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "EndpointSlice": (
        ("endpoints", f"{_ENDPOINTS_MAX} at most"),
        ("endpoints[].addresses", f"1 to {_ADDRESSES_MAX}; each of the family that addressType says"),
        ("endpoints[].hints.forZones, forNodes", f"{_HINTS_MAX} at most each, no name twice"),
        ("ports[].name", "Each once; so only one port has none"),
    ),
    "Endpoints": (
        ("subsets[]", "Has addresses or notReadyAddresses"),
        ("subsets[].ports[].name", "Each of several ports has one"),
    ),
    "Pod": (
        ("spec.containers[].ports[].name", "Each once in a container, if it has one"),
        ("status.podIPs", "One a family, the first that of podIP"),
    ),
    "Node": (("spec.podCIDRs", "One a family, the first that of podCIDR"),),
}


# ---- applying them


def relation_errors(kind: str, plain: _Plain) -> Iterator[ConfigError]:
    """Yield what the API server refuses in *plain* though each value by itself is right."""
    spec = plain.get("spec")
    if kind == "Service" and isinstance(spec, Mapping):
        for relation in RELATIONS:
            if relation.is_wrong(spec):
                yield ConfigError(relation.demand, field=_first(plain, relation.field), mend=relation.mend)
        if spec.get("loadBalancerIP") and _type(spec) != "LoadBalancer":
            said = f"it has no effect in a {_type(spec)} Service"
            yield Note(said, field="spec.loadBalancerIP", mend="write 'type: LoadBalancer', or leave it out")
    elif kind == "EndpointSlice":
        yield from _slice_errors(plain)
    elif kind == "Endpoints":
        yield from _endpoints_errors(plain)
    elif kind in ("Pod", "Node"):
        field, single = ("status.podIPs", "podIP") if kind == "Pod" else ("spec.podCIDRs", "podCIDR")
        yield from _one_a_family(plain, field, single)
        for part in ("containers", "initContainers") if kind == "Pod" else ():
            for index, container in enumerate((spec or {}).get(part) or ()):
                yield from _repeated(container.get("ports") or (), f"spec.{part}[{index}].ports")


def _slice_errors(plain: _Plain) -> Iterator[ConfigError]:
    if not plain.get("addressType"):
        yield ConfigError(
            "the slice does not say of which family it is", field="addressType", mend="add 'addressType: IPv4'"
        )
    family = plain.get("addressType")
    for index, endpoint in enumerate(plain.get("endpoints") or ()):
        field = f"endpoints[{index}]"
        if not endpoint.get("addresses"):
            yield ConfigError("the endpoint has no address", field=f"{field}.addresses", mend="add addresses")
        hints = endpoint.get("hints") or {}
        yield from _too_many(endpoint.get("addresses"), f"{field}.addresses", _ADDRESSES_MAX)
        for name in ("forZones", "forNodes"):
            yield from _too_many(hints.get(name), f"{field}.hints.{name}", _HINTS_MAX)
            yield from _repeated(hints.get(name) or (), f"{field}.hints.{name}")
        for at, ip in enumerate(endpoint.get("addresses") or ()):
            if family in ("IPv4", "IPv6") and decode.is_ip(ip) and (":" in ip) is not (family == "IPv6"):
                said = f"{ip!r} is no {family} address, which addressType says"
                yield ConfigError(said, field=f"{field}.addresses[{at}]", mend="write one slice for each family")
    yield from _too_many(plain.get("endpoints"), "endpoints", _ENDPOINTS_MAX)
    yield from _repeated(plain.get("ports") or (), "ports", is_name_needed=True)


def _too_many(items: Sequence[object] | None, field: str, limit: int) -> Iterator[ConfigError]:
    if items and len(items) > limit:
        mend = "spread them over several slices" if limit > _HINTS_MAX else "keep the nearest"
        yield ConfigError(f"{len(items)} are too many, {limit} are allowed", field=field, mend=mend)


def _endpoints_errors(plain: _Plain) -> Iterator[ConfigError]:
    for index, subset in enumerate(plain.get("subsets") or ()):
        ports = subset.get("ports") or ()
        if not (subset.get("addresses") or subset.get("notReadyAddresses")) and not ports:
            yield ConfigError("the subset is empty", field=f"subsets[{index}]", mend="add addresses and ports")
        for at, port in enumerate(ports):
            if port.get("port") is None:
                yield ConfigError("there is no port", field=f"subsets[{index}].ports[{at}].port", mend="add port")
            if len(ports) > 1 and not port.get("name"):
                said, field = "each of several ports has a name", f"subsets[{index}].ports[{at}].name"
                yield ConfigError(said, field=field, mend="add name")


def _repeated(items: Sequence[_Plain], field: str, *, is_name_needed: bool = False) -> Iterator[ConfigError]:
    """Yield which of *items* have the name of another; if *is_name_needed*, no name counts as a name."""
    first: dict[str, int] = {}
    for index, item in enumerate(items):
        name = item.get("name") or ""
        if (name or is_name_needed) and first.setdefault(name, index) != index:
            said = f"the name {name!r} is already that of [{first[name]}]" if name else "two ports have no name"
            yield ConfigError(said, field=f"{field}[{index}].name", mend="give each a name of its own")


def _one_a_family(plain: _Plain, field: str, single: str) -> Iterator[ConfigError]:
    """Yield which of the addresses or ranges at *field* is a second one of its family, or not what *single* says."""
    section, name = field.split(".")
    given = (plain.get(section) or {}).get(name) or ()
    texts = [item.get("ip") if isinstance(item, Mapping) else item for item in given]
    families: set[bool] = set()
    for index, text in enumerate(texts):
        if isinstance(text, str):
            if (":" in text) in families:
                yield ConfigError(
                    f"{text} is a second one of its family", field=f"{field}[{index}]", mend="keep one a family"
                )
            families.add(":" in text)
    alone = plain[section].get(single) if texts else None
    if alone and texts[0] and alone != texts[0]:
        said = f"{alone} is not the first of {field}"
        yield ConfigError(said, field=f"{section}.{single}", mend="write the same in both, or leave one field out")


def _first(plain: _Plain, path: str) -> str:
    """Return the first field that *path* means and *plain* has, for a relation that is about any of them."""
    return next((field for field, value in values_at(plain, path) if value), path.partition("[]")[0])
