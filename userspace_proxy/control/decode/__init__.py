"""API structs -> model values. Pure; what makes no sense is refused with the field and the mend.

A ConfigError that is *raised* refuses the whole object; one that is *returned* is about a part of it, and the
other parts go on.
"""

from userspace_proxy.control.decode.addresses import (
    backend_ip_errors,
    canonical_cidr,
    canonical_ip,
    is_cidr,
    is_ip,
    is_port,
    number_errors,
    virtual_ip_errors,
)
from userspace_proxy.control.decode.annotations import (
    ANNOTATION_PREFIX,
    ANNOTATIONS,
    IPVS_SCHEDULER,
    SOURCE_IP,
    WEIGHTS,
)
from userspace_proxy.control.decode.endpoints import (
    SERVICE_NAME_LABEL,
    EndpointsByPort,
    endpoints_of,
    from_endpoints,
    from_pods,
    from_slices,
    offered_ports,
    pod_ips,
    service_of,
    target_port,
    trigger_time,
)
from userspace_proxy.control.decode.nodes import is_eligible, node_of
from userspace_proxy.control.decode.service_ports import (
    Allotted,
    PortKey,
    given_cluster_ips,
    has_node_ports,
    ingress,
    own_portals,
    port_key,
    service_ports,
    stated_portals,
    wants_health_check,
    wants_load_balancer_ips,
    wants_node_ports,
)
from userspace_proxy.control.decode.services import check_service, is_proxied, service_errors

__all__ = [
    "ANNOTATIONS",
    "ANNOTATION_PREFIX",
    "IPVS_SCHEDULER",
    "SERVICE_NAME_LABEL",
    "SOURCE_IP",
    "WEIGHTS",
    "Allotted",
    "EndpointsByPort",
    "PortKey",
    "backend_ip_errors",
    "canonical_cidr",
    "canonical_ip",
    "check_service",
    "endpoints_of",
    "from_endpoints",
    "from_pods",
    "from_slices",
    "given_cluster_ips",
    "has_node_ports",
    "ingress",
    "is_cidr",
    "is_eligible",
    "is_ip",
    "is_port",
    "is_proxied",
    "node_of",
    "number_errors",
    "offered_ports",
    "own_portals",
    "pod_ips",
    "port_key",
    "service_errors",
    "service_of",
    "service_ports",
    "stated_portals",
    "target_port",
    "trigger_time",
    "virtual_ip_errors",
    "wants_health_check",
    "wants_load_balancer_ips",
    "wants_node_ports",
]
