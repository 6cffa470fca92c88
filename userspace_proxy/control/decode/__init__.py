"""Decodes API structs into model values. Pure; each rejected value is reported with its field and how to fix it.

A ConfigError that is *raised* rejects the whole object. One that is *returned* rejects a part of it; the rest is used.
"""

from userspace_proxy.control.decode.addresses import (
    backend_ip_errors,
    canonical_ip,
    is_cidr,
    is_ip,
    is_port,
    virtual_ip_errors,
)
from userspace_proxy.control.decode.annotations import (
    ANNOTATION_PREFIX,
    ANNOTATIONS,
    HEALTH_CHECK,
    DnsTarget,
    dns_target,
)
from userspace_proxy.control.decode.endpoints import (
    SERVICE_NAME_LABEL,
    EndpointsByPort,
    endpoints_of,
    from_endpoints,
    from_pods,
    from_slices,
    has_ended,
    offered_ports,
    pod_ips,
    service_of,
    target_port,
    trigger_time,
)
from userspace_proxy.control.decode.names import (
    cluster_ip_names,
    external_name,
    headless_names,
    valid_cluster_ips,
)
from userspace_proxy.control.decode.nodes import is_eligible, node_of
from userspace_proxy.control.decode.service_ports import (
    Allocation,
    PortKey,
    given_cluster_ips,
    has_node_ports,
    is_headless,
    own_portals,
    port_key,
    service_ports,
    stated_portals,
    wants_health_check,
    wants_load_balancer_ips,
    wants_node_ports,
)
from userspace_proxy.control.decode.services import check_service, is_proxied, service_errors
