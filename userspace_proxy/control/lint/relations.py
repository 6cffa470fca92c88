"""The API server's rules for fields that are valid one by one but contradict each other. Pure."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from userspace_proxy.control import decode
from userspace_proxy.control.pools import NODE_PORTS
from userspace_proxy.errors import ConfigError, Note

_Plain = Mapping[str, Any]

ENDPOINTS_MAX = 1_000
ADDRESSES_MAX = 100
HINTS_MAX = 8


class Relation(NamedTuple):
    """What the API server demands of ``field`` beside other fields of a Service's spec.

    ``is_wrong`` returns whether a spec breaks the rule; ``fix`` says how to repair it.
    """

    field: str
    demand: str
    is_wrong: Callable[[_Plain], object]
    fix: str


def _type(spec: _Plain) -> str:
    return spec.get("type") or "ClusterIP"


def _cluster_ips(spec: _Plain) -> list[Any]:
    return spec.get("clusterIPs") or ([spec["clusterIP"]] if spec.get("clusterIP") else [])


def _has_node_port(spec: _Plain) -> bool:
    return any(port.get("nodePort") for port in spec.get("ports") or ())


def _is_externally_accessible(spec: _Plain) -> bool:
    return _type(spec) in ("NodePort", "LoadBalancer") or (_type(spec) == "ClusterIP" and bool(spec.get("externalIPs")))


def _is_single_stack(spec: _Plain) -> bool:
    """Return whether *spec* has ipFamilyPolicy SingleStack; a headless Service without selector is dual by default."""
    is_dual_by_default = "None" in _cluster_ips(spec) and not spec.get("selector")
    return (spec.get("ipFamilyPolicy") or "SingleStack") == "SingleStack" and not is_dual_by_default


def _has_two_families(spec: _Plain) -> bool:
    return len(set(spec.get("ipFamilies") or ())) > 1 or len(set(_cluster_ips(spec)) - {"None"}) > 1


def _is_set_for_external_name(field: str, spec: _Plain) -> bool:
    return _type(spec) == "ExternalName" and bool(spec.get(field))


def _is_set_without_load_balancer(field: str, spec: _Plain) -> bool:
    return _type(spec) != "LoadBalancer" and (bool(spec.get(field)) or spec.get(field) is False)


_NODE_PORTS = f"a number from {NODE_PORTS.start} to {NODE_PORTS.stop - 1}"

# A table. The formatter would make seven lines of each entry.
# fmt: off
RELATIONS: tuple[Relation, ...] = (
    Relation("spec.clusterIP", "a Service of type NodePort or LoadBalancer cannot be headless",
        lambda s: "None" in _cluster_ips(s)[:1] and _type(s) in ("NodePort", "LoadBalancer"),
        "leave clusterIP out, or write 'type: ClusterIP'"),
    Relation("spec.clusterIPs", "None stands alone",
        lambda s: "None" in _cluster_ips(s) and len(_cluster_ips(s)) > 1, "write [None], or addresses alone"),
    Relation("spec.clusterIPs", "it stands beside clusterIP, and its first address is the same",
        lambda s: s.get("clusterIPs") and not s.get("clusterIP") and _type(s) != "ExternalName",
        "add clusterIP with the first of these addresses"),
    Relation("spec.externalName", "a Service of type ExternalName names a host",
        lambda s: _type(s) == "ExternalName" and not s.get("externalName"),
        "add externalName, or write another type"),
    *(Relation(f"spec.{field}", "a Service of type ExternalName has no addresses",
        partial(_is_set_for_external_name, field), "leave it out")
        for field in ("clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy")),
    Relation("spec.ports[].nodePort", "a ClusterIP Service has no node ports",
        lambda s: _type(s) == "ClusterIP" and _has_node_port(s), "write 'type: NodePort'"),
    Relation("spec.sessionAffinityConfig", "a Service without session affinity has no configuration of it",
        lambda s: s.get("sessionAffinityConfig") is not None and s.get("sessionAffinity") != "ClientIP",
        "write 'sessionAffinity: ClientIP', or leave it out"),
    Relation("spec.ipFamilies", "each family stands once",
        lambda s: len(set(s.get("ipFamilies") or ())) < len(s.get("ipFamilies") or ()),
        "write IPv4 and IPv6, or one of them"),
    Relation("spec.ipFamilyPolicy", "SingleStack, the default, is one family and one address",
        lambda s: _is_single_stack(s) and _has_two_families(s),
        "write PreferDualStack, or keep one family and one address"),
    *(Relation(f"spec.{field}", "it counts for Services of type LoadBalancer alone",
        partial(_is_set_without_load_balancer, field), "write 'type: LoadBalancer', or leave it out")
        for field in ("loadBalancerSourceRanges", "loadBalancerClass", "allocateLoadBalancerNodePorts",
                      "healthCheckNodePort")),
    Relation("spec.healthCheckNodePort",
        "load balancers get the number of endpoints only with externalTrafficPolicy: Local",
        lambda s: (s.get("healthCheckNodePort") and _type(s) == "LoadBalancer"
                   and s.get("externalTrafficPolicy") != "Local"),
        "write 'externalTrafficPolicy: Local', or leave it out"),
    Relation("spec.healthCheckNodePort", f"it is {_NODE_PORTS}",
        lambda s: s.get("healthCheckNodePort") and s["healthCheckNodePort"] not in NODE_PORTS,
        f"write {_NODE_PORTS}, or leave it out"),
    Relation("spec.externalTrafficPolicy",
        "a Service without node ports and externalIPs has no clients from outside",
        lambda s: s.get("externalTrafficPolicy") and not _is_externally_accessible(s),
        "leave it out, or write 'type: NodePort'"),
)
# fmt: on


def relation_errors(kind: str, plain: _Plain) -> Iterator[ConfigError]:
    """Yield the contradictions in *plain*, an object of *kind* whose values are valid one by one."""
    return _ERRORS_OF[kind](plain)


def _service_errors(plain: _Plain) -> Iterator[ConfigError]:
    if not isinstance(spec := plain.get("spec"), Mapping):
        return
    for relation in RELATIONS:
        if relation.is_wrong(spec):
            with_node_port = (index for index, port in enumerate(spec.get("ports") or ()) if port.get("nodePort"))
            field = relation.field.replace("[]", f"[{next(with_node_port, 0)}]")
            yield ConfigError(relation.demand, field=field, fix=relation.fix)
    if spec.get("loadBalancerIP") and _type(spec) != "LoadBalancer":
        reason = f"it has no effect in a {_type(spec)} Service"
        yield Note(reason, field="spec.loadBalancerIP", fix="write 'type: LoadBalancer', or leave it out")


def _slice_errors(plain: _Plain) -> Iterator[ConfigError]:
    if not plain.get("addressType"):
        fix = "add 'addressType: IPv4'"
        yield ConfigError("the slice does not say of which family it is", field="addressType", fix=fix)
    for index, endpoint in enumerate(plain.get("endpoints") or ()):
        yield from _slice_endpoint_errors(endpoint, f"endpoints[{index}]", plain.get("addressType"))
    yield from _too_many(plain.get("endpoints"), "endpoints", ENDPOINTS_MAX)
    yield from _repeated(plain.get("ports"), "ports", is_name_needed=True)


def _slice_endpoint_errors(endpoint: _Plain, field: str, family: str | None) -> Iterator[ConfigError]:
    addresses, hints = endpoint.get("addresses") or (), endpoint.get("hints") or {}
    if not addresses:
        yield ConfigError("the endpoint has no address", field=f"{field}.addresses", fix="add addresses")
    yield from _too_many(addresses, f"{field}.addresses", ADDRESSES_MAX)
    for name in ("forZones", "forNodes"):
        yield from _too_many(hints.get(name), f"{field}.hints.{name}", HINTS_MAX)
        yield from _repeated(hints.get(name), f"{field}.hints.{name}")
    for at, ip in enumerate(addresses if family in ("IPv4", "IPv6") else ()):
        if decode.is_ip(ip) and (":" in ip) is not (family == "IPv6"):
            reason = f"{ip!r} is no {family} address, which addressType says"
            yield ConfigError(reason, field=f"{field}.addresses[{at}]", fix="write one slice for each family")


def _too_many(items: Sequence[object] | None, field: str, limit: int) -> Iterator[ConfigError]:
    if items and len(items) > limit:
        fix = "spread them over several slices" if limit > HINTS_MAX else "keep the nearest"
        yield ConfigError(f"{len(items)} are too many, {limit} are allowed", field=field, fix=fix)


def _endpoints_errors(plain: _Plain) -> Iterator[ConfigError]:
    for index, subset in enumerate(plain.get("subsets") or ()):
        yield from _subset_errors(subset, f"subsets[{index}]")


def _subset_errors(subset: _Plain, field: str) -> Iterator[ConfigError]:
    ports = subset.get("ports") or ()
    if not (subset.get("addresses") or subset.get("notReadyAddresses") or ports):
        yield ConfigError("the subset is empty", field=field, fix="add addresses and ports")
    for at, port in enumerate(ports):
        if port.get("port") is None:
            yield ConfigError("there is no port", field=f"{field}.ports[{at}].port", fix="add port")
        if len(ports) > 1 and not port.get("name"):
            yield ConfigError("each of several ports has a name", field=f"{field}.ports[{at}].name", fix="add name")


def _pod_errors(plain: _Plain) -> Iterator[ConfigError]:
    yield from _one_a_family(plain, "status.podIPs", "podIP")
    for part in ("containers", "initContainers"):
        for index, container in enumerate((plain.get("spec") or {}).get(part) or ()):
            yield from _repeated(container.get("ports"), f"spec.{part}[{index}].ports")


_ERRORS_OF: Mapping[str, Callable[[_Plain], Iterator[ConfigError]]] = {
    "Service": _service_errors,
    "EndpointSlice": _slice_errors,
    "Endpoints": _endpoints_errors,
    "Pod": _pod_errors,
    "Node": lambda plain: _one_a_family(plain, "spec.podCIDRs", "podCIDR"),
}


def _repeated(items: Sequence[_Plain] | None, field: str, *, is_name_needed: bool = False) -> Iterator[ConfigError]:
    """Yield an error for each of *items* with the name of an earlier one; if *is_name_needed*, also without a name."""
    first: dict[str, int] = {}
    for index, item in enumerate(items or ()):
        name = item.get("name") or ""
        if (name or is_name_needed) and first.setdefault(name, index) != index:
            reason = f"the name {name!r} is already that of [{first[name]}]" if name else "two ports have no name"
            yield ConfigError(reason, field=f"{field}[{index}].name", fix="give each a name of its own")


def _one_a_family(plain: _Plain, field: str, single: str) -> Iterator[ConfigError]:
    """Yield an error for each address or range at *field* that is a second one of its family.

    Yield one, too, if the first differs from the field *single*.
    """
    section, name = field.split(".")
    values = plain.get(section) or {}
    texts = [item.get("ip") if isinstance(item, Mapping) else item for item in values.get(name) or ()]
    families = [":" in text if isinstance(text, str) else None for text in texts]
    for index, family in enumerate(families):
        if family is not None and family in families[:index]:
            reason = f"{texts[index]} is a second one of its family"
            yield ConfigError(reason, field=f"{field}[{index}]", fix="keep one a family")
    alone = values.get(single)
    if alone and texts and texts[0] and alone != texts[0]:
        reason = f"{alone} is not the first of {field}"
        yield ConfigError(reason, field=f"{section}.{single}", fix="write the same in both, or leave one field out")
