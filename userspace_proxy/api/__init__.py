"""Kubernetes objects as typed structs, shared by every source."""

from userspace_proxy.api.convert import (
    KINDS,
    KubernetesObject,
    below,
    convert,
    convert_to,
    field_of,
    key_space_error,
    space_error,
    steps,
)
from userspace_proxy.api.objects import (
    Endpoints,
    EndpointSlice,
    Node,
    ObjectMeta,
    Pod,
    Service,
    ServiceCIDR,
    ServicePort,
)
