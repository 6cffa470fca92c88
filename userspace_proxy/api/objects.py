"""The fields of each Kubernetes kind that the proxy reads. Other fields are skipped.

Go encodes an empty list as ``null``, so every field may be None. Only types are checked here; control/decode
validates the values.
"""

from msgspec import Struct

# The API writes initialisms in capitals (clusterIP, podCIDRs), which no camel-case rule produces.
_INITIALISMS = {"ip": "IP", "ips": "IPs", "cidr": "CIDR", "cidrs": "CIDRs"}


def _api_name(field: str) -> str:
    first, *rest = field.split("_")
    return first + "".join(_INITIALISMS.get(word) or word.capitalize() for word in rest)


class _Object(Struct, rename=_api_name, frozen=True, gc=False):
    """The base of all parts of objects. They hold no cycles, so the garbage collector need not visit them."""


class ObjectMeta(_Object, frozen=True):
    name: str = ""
    namespace: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None


# ---- Service


class ServicePort(_Object, frozen=True):
    port: int
    name: str | None = None
    protocol: str | None = None
    target_port: int | str | None = None
    node_port: int | None = None


class ClientIPConfig(_Object, frozen=True):
    timeout_seconds: int | None = None


class SessionAffinityConfig(_Object, frozen=True):
    client_ip: ClientIPConfig | None = None


class ServiceSpec(_Object, frozen=True):
    type: str | None = None
    external_name: str | None = None
    selector: dict[str, str] | None = None
    cluster_ip: str | None = None
    cluster_ips: list[str] | None = None
    external_ips: list[str] | None = None
    ports: list[ServicePort] | None = None
    session_affinity: str | None = None
    session_affinity_config: SessionAffinityConfig | None = None
    publish_not_ready_addresses: bool | None = None
    ip_family_policy: str | None = None
    ip_families: list[str] | None = None
    internal_traffic_policy: str | None = None
    external_traffic_policy: str | None = None
    health_check_node_port: int | None = None
    allocate_load_balancer_node_ports: bool | None = None
    load_balancer_ip: str | None = None
    load_balancer_class: str | None = None
    load_balancer_source_ranges: list[str] | None = None


class LoadBalancerIngress(_Object, frozen=True):
    ip: str | None = None
    ip_mode: str | None = None


class LoadBalancerStatus(_Object, frozen=True):
    ingress: list[LoadBalancerIngress] | None = None


class ServiceStatus(_Object, frozen=True):
    load_balancer: LoadBalancerStatus | None = None


class Service(_Object, frozen=True):
    metadata: ObjectMeta
    spec: ServiceSpec | None = None
    status: ServiceStatus | None = None


# ---- EndpointSlice


class EndpointConditions(_Object, frozen=True):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class Hint(_Object, frozen=True):
    """The name of a zone or node that an endpoint is assigned to."""

    name: str | None = None


class EndpointHints(_Object, frozen=True):
    for_zones: list[Hint] | None = None
    for_nodes: list[Hint] | None = None


class SliceEndpoint(_Object, frozen=True):
    addresses: list[str] | None = None
    conditions: EndpointConditions | None = None
    hostname: str | None = None
    node_name: str | None = None
    hints: EndpointHints | None = None


class EndpointPort(_Object, frozen=True):
    """A port of an EndpointSlice or of an Endpoints subset."""

    port: int | None = None
    name: str | None = None
    protocol: str | None = None


class EndpointSlice(_Object, frozen=True):
    metadata: ObjectMeta
    address_type: str = "IPv4"
    endpoints: list[SliceEndpoint] | None = None
    ports: list[EndpointPort] | None = None


# ---- Endpoints, the older form


class EndpointAddress(_Object, frozen=True):
    ip: str
    hostname: str | None = None
    node_name: str | None = None


class EndpointSubset(_Object, frozen=True):
    addresses: list[EndpointAddress] | None = None
    not_ready_addresses: list[EndpointAddress] | None = None
    ports: list[EndpointPort] | None = None


class Endpoints(_Object, frozen=True):
    metadata: ObjectMeta
    subsets: list[EndpointSubset] | None = None


# ---- Pod


class ContainerPort(_Object, frozen=True):
    container_port: int
    name: str | None = None
    protocol: str | None = None


class Container(_Object, frozen=True):
    ports: list[ContainerPort] | None = None
    restart_policy: str | None = None


class PodSpec(_Object, frozen=True):
    containers: list[Container] | None = None
    init_containers: list[Container] | None = None
    hostname: str | None = None
    subdomain: str | None = None
    node_name: str | None = None


class PodIP(_Object, frozen=True):
    ip: str | None = None


class PodCondition(_Object, frozen=True):
    type: str
    status: str


class PodStatus(_Object, frozen=True):
    phase: str | None = None
    pod_ip: str | None = None
    pod_ips: list[PodIP] | None = None
    conditions: list[PodCondition] | None = None


class Pod(_Object, frozen=True):
    metadata: ObjectMeta
    spec: PodSpec | None = None
    status: PodStatus | None = None


# ---- Node


class Taint(_Object, frozen=True):
    key: str


class NodeSpec(_Object, frozen=True):
    taints: list[Taint] | None = None
    pod_cidr: str | None = None
    pod_cidrs: list[str] | None = None


class NodeAddress(_Object, frozen=True):
    type: str | None = None
    address: str | None = None


class NodeStatus(_Object, frozen=True):
    addresses: list[NodeAddress] | None = None


class Node(_Object, frozen=True):
    metadata: ObjectMeta
    spec: NodeSpec | None = None
    status: NodeStatus | None = None


# ---- ServiceCIDR


class ServiceCIDRSpec(_Object, frozen=True):
    cidrs: list[str] | None = None


class ServiceCIDR(_Object, frozen=True):
    metadata: ObjectMeta
    spec: ServiceCIDRSpec | None = None
