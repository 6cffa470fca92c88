"""Find service ports whose traffic must stay on this node but has no endpoint here. Pure."""

from collections import Counter
from collections.abc import Mapping
from itertools import product

from userspace_proxy.model.endpoint import family_of
from userspace_proxy.model.state import ProxyState
from userspace_proxy.model.topology import reach

POLICIES = ("internal", "external")


def without_local_endpoints(state: ProxyState) -> Mapping[tuple[str, str], int]:
    """Return, by policy and IP family, the number of service ports with policy Local that have endpoints but none here.

    Service ports without any endpoint are not counted (kube-proxy: TestNoEndpointsMetric, behaviours 8).
    """
    counts = Counter(dict.fromkeys(product(POLICIES, ("IPv4", "IPv6")), 0))
    for name, service_port in state.service_ports.items():
        local = (service_port.internal_local, service_port.external_local and service_port.is_externally_accessible)
        if not any(local):
            continue
        for family in service_port.families:
            endpoints = [e for e in state.endpoints[name] if family_of(e.ip) == family]
            found = reach(service_port, endpoints, state.node)
            if found.has_any and not found.local:
                counts.update(
                    (policy, f"IPv{family}") for policy, is_local in zip(POLICIES, local, strict=True) if is_local
                )
    return counts
