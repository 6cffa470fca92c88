"""The errors in one object by itself. Pure."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from itertools import islice

from userspace_proxy import api
from userspace_proxy.control import decode
from userspace_proxy.control.fields import field_errors, is_similar, kind_errors
from userspace_proxy.control.lint.api_rules import value_errors
from userspace_proxy.control.lint.options import LintOptions
from userspace_proxy.control.lint.relations import relation_errors
from userspace_proxy.control.pools import Network, address_of
from userspace_proxy.errors import ConfigError, Note
from userspace_proxy.sources.documents import Manifest

# Set by a controller of several clusters: such a slice belongs to no Service of this one.
_MULTICLUSTER = "multicluster.kubernetes.io/"
_MANAGED_BY = "endpointslice.kubernetes.io/managed-by"
# At most this many errors are named for one object.
_ERRORS_MAX = 50


def object_errors(manifest: Manifest, options: LintOptions) -> Iterator[tuple[ConfigError, bool]]:
    """Yield (error, whether `run` reports it, too) for *manifest*, at most one error for each field."""
    is_read = manifest.kind in api.KINDS and (manifest.object is not None or manifest.errors)
    named: set[str] = set()
    for error, is_reported in _all_errors(manifest, options) if is_read else _kind_errors(manifest):
        if error.field in named:
            continue
        if len(named) == _ERRORS_MAX:
            yield ConfigError(f"more than {_ERRORS_MAX} fields are wrong", fix="mend those that are named"), False
            return
        named.add(error.field)
        yield error, is_reported


def _kind_errors(manifest: Manifest) -> Iterator[tuple[ConfigError, bool]]:
    version = str((manifest.plain or {}).get("apiVersion"))
    if "." not in version or version.startswith("discovery.k8s.io/"):
        yield from ((error, False) for error in kind_errors(manifest.kind))


def _all_errors(manifest: Manifest, options: LintOptions) -> Iterator[tuple[ConfigError, bool]]:
    """Yield the errors in the names of fields, then those in types, values and their relations.

    Skip those of a field whose misspelt name is an error already.
    """
    shape = list(islice(field_errors(manifest.kind, manifest.plain or {}), _ERRORS_MAX + 1))
    yield from ((error, False) for error in shape)
    for error, is_reported in _value_errors(manifest, shape, options):
        key = error.field.rpartition(".")[2]
        if not any(is_similar(unknown, key) for unknown in shape):
            yield error, is_reported


def _value_errors(
    manifest: Manifest, shape: Sequence[ConfigError], options: LintOptions
) -> Iterator[tuple[ConfigError, bool]]:
    """Yield the errors in types, values and their relations; *shape* are those in the names of fields."""
    kind, plain = manifest.kind, manifest.plain or {}
    unknown: dict[str, list[ConfigError]] = defaultdict(list)
    for error in shape:
        unknown[error.field.rpartition(".")[0]].append(error)
    mistyped = [error for error in manifest.errors if not _follows(error, unknown[error.field])]
    by_value = value_errors(kind, plain)
    refused = list(_decode_errors(manifest, options.proxy_name, is_misshapen=bool(shape or mistyped)))
    yield from ((error, True) for error in (*mistyped, *refused))
    yield from ((error, False) for error in by_value)
    # A value that is wrong by itself contradicts others for that reason alone.
    is_wrong = any(
        error.field.startswith(("spec", "status")) and "ports[" not in error.field for error in (*by_value, *refused)
    )
    if not (manifest.errors or is_wrong or any(error.field == "spec" for error in shape)):
        yield from ((error, False) for error in relation_errors(kind, plain))
    yield from ((error, False) for error in _own_errors(manifest, options))


def _follows(error: ConfigError, unknown: Sequence[ConfigError]) -> bool:
    """Return whether *error*, a wrong type, follows from the *unknown* fields right below its own."""
    _, lacks, missing = error.reason.partition("lacks the field ")
    if lacks:  # what is missing stands there, misspelt
        return any(is_similar(field, missing) for field in unknown)
    return any(field.reason == error.reason for field in unknown)


def _decode_errors(manifest: Manifest, proxy_name: str, *, is_misshapen: bool) -> Iterator[ConfigError]:
    if isinstance(manifest.object, api.Service):
        # Missing ports, or a missing spec, are not reported again if one is misplaced or misspelt.
        for error in decode.service_errors(manifest.object, proxy_name):
            if not (is_misshapen and error.field in ("", "spec")):
                yield error


def _own_errors(manifest: Manifest, options: LintOptions) -> Iterator[ConfigError]:
    match manifest.object:
        case api.Service() as service:
            yield from _service_errors(service)
            for key, value in (service.metadata.annotations or {}).items():
                yield from _annotation_errors(key, value, options)
        case api.EndpointSlice() as piece:
            if piece.address_type in ("IPv4", "IPv6"):
                yield from _addresses_errors(piece, options.cluster_ips)
            yield from _slice_errors(piece)
        case api.Endpoints() as endpoints:
            yield from _addresses_errors(endpoints, options.cluster_ips)
        case api.Pod() as pod:
            for field, ip in address_fields(pod):
                yield from decode.backend_ip_errors(ip, field)


def _service_errors(service: api.Service) -> Iterator[ConfigError]:
    spec = service.spec
    if spec is None:
        return
    if spec.load_balancer_ip:
        yield from decode.virtual_ip_errors(spec.load_balancer_ip, "spec.loadBalancerIP")
    for index, port in enumerate(spec.ports or ()):
        if isinstance(port.target_port, str) and port.target_port.isdigit():
            reason, fix = f"{port.target_port!r} in quotes is a name, which needs a letter", "write it without quotes"
            yield ConfigError(reason, field=f"spec.ports[{index}].targetPort", fix=f"{fix}: {port.target_port}")


def _annotation_errors(key: str, value: str, options: LintOptions) -> Iterator[ConfigError]:
    """Yield that the annotation *key* has no effect in the mode, or that there is none of this name."""
    field = api.below("metadata.annotations", key)
    modes = (*options.annotation_modes.get(key, ()), *options.annotation_modes.get(f"{key}: {value}", ()))
    if modes and options.mode and options.mode not in modes:
        fix = f"it is for --proxy-mode {' or '.join(modes)}"
        yield Note(f"it has no effect in {options.mode} mode", field=field, fix=fix)
    elif key.startswith(decode.ANNOTATION_PREFIX) and key not in decode.ANNOTATIONS:
        close = get_close_matches(key, decode.ANNOTATIONS, n=1)
        fix = f"did you mean {close[0]!r}?" if close else f"ours are {', '.join(decode.ANNOTATIONS)}"
        yield ConfigError(f"there is no annotation {key!r}", field=field, fix=fix)


def _slice_errors(piece: api.EndpointSlice) -> Iterator[ConfigError]:
    if piece.address_type == "FQDN":
        fix = "write IPv4 or IPv6; a proxy reads no others"
        yield Note("'FQDN' cannot be proxied, the slice is skipped", field="addressType", fix=fix)
    labels = piece.metadata.labels or {}
    is_elsewhere = any(key.startswith(_MULTICLUSTER) or key == _MANAGED_BY for key in labels)
    if not labels.get(decode.SERVICE_NAME_LABEL) and not is_elsewhere:
        reason = f"the label {decode.SERVICE_NAME_LABEL} is missing, so it belongs to no Service"
        field = api.below("metadata.labels", decode.SERVICE_NAME_LABEL)
        yield ConfigError(reason, field=field, fix=f"add '{decode.SERVICE_NAME_LABEL}: NAME'")


def _addresses_errors(
    piece: api.EndpointSlice | api.Endpoints, cluster_ips: Sequence[Network]
) -> Iterator[ConfigError]:
    for field, ip in address_fields(piece):
        yield from _backend_errors(ip, field, cluster_ips)
        if field.endswith(".addresses[1]"):
            fix = "write an endpoint for each address"
            yield Note("of an endpoint's addresses a proxy uses only the first", field=field, fix=fix)


def _backend_errors(ip: str, field: str, cluster_ips: Sequence[Network]) -> Iterator[ConfigError]:
    errors = list(decode.backend_ip_errors(ip, field))
    yield from errors
    if errors:
        return
    address = address_of(decode.canonical_ip(ip))
    if address.is_loopback:
        fix = "write another address of the host for use in a cluster"
        yield Note("the API server refuses a loopback address; 'run' serves it on this host", field=field, fix=fix)
    if network := next((network for network in cluster_ips if address in network), None):
        reason = f"{ip} is of the Service range {network}; a proxy does not forward from one Service to another"
        yield ConfigError(reason, field=field, fix="write the addresses of Pods or hosts")


def address_fields(given: object) -> Iterator[tuple[str, str]]:
    """Yield (field, IP as written) for each address of *given*, a Pod, a slice or Endpoints."""
    match given:
        case api.Pod(status=api.objects.PodStatus() as status):
            fields = [("status.podIP", status.pod_ip)]
            fields += ((f"status.podIPs[{index}].ip", item.ip) for index, item in enumerate(status.pod_ips or ()))
            yield from ((field, ip) for field, ip in fields if ip)
        case api.EndpointSlice(endpoints=endpoints):
            for index, endpoint in enumerate(endpoints or ()):
                yield from (
                    (f"endpoints[{index}].addresses[{at}]", ip) for at, ip in enumerate(endpoint.addresses or ())
                )
        case api.Endpoints(subsets=subsets):
            for index, subset in enumerate(subsets or ()):
                for part, addresses in (
                    ("addresses", subset.addresses),
                    ("notReadyAddresses", subset.not_ready_addresses),
                ):
                    yield from (
                        (f"subsets[{index}].{part}[{at}].ip", each.ip) for at, each in enumerate(addresses or ())
                    )
