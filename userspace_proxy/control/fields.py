"""The kinds and fields of the API: reports misspelt and misplaced ones. Pure.

`run` skips unknown fields, as Kubernetes clients do; `check` reports them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from userspace_proxy import api
from userspace_proxy.errors import ConfigError

# Field name -> the fields below it, or None if any may follow. The fields of list items are given as if there were no
# list.
_Tree = Mapping[str, "_Tree | None"]

_CLOSE = 0.7
_CLOSE_KIND = 0.85
_VERSIONS = {"EndpointSlice": ("discovery.k8s.io/v1", "discovery.k8s.io/v1beta1")}
SUBDOMAIN = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
# Fields that other kinds spell differently.
_NAMES_ELSEWHERE = {"containerPort": ("targetPort", "port"), "hostPort": ("nodePort",), "targetPort": ("port",)}
_LISTS = ("ports", "endpoints", "subsets", "addresses", "notReadyAddresses")
_SERVICE_TYPES = ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName")


def _leaves(names: str) -> dict[str, _Tree | None]:
    return dict.fromkeys(names.split())


_TOP = {
    **_leaves("apiVersion kind"),
    "metadata": _leaves(
        "name generateName namespace labels annotations uid resourceVersion generation creationTimestamp "
        "deletionTimestamp deletionGracePeriodSeconds finalizers ownerReferences managedFields selfLink clusterName"
    ),
}
_ENDPOINT_PORT = _leaves("name protocol port appProtocol")
_ENDPOINT_ADDRESS = _leaves("ip hostname nodeName targetRef")

_FIELDS: Mapping[str, _Tree] = {
    "Service": {
        **_TOP,
        "spec": {
            **_leaves(
                "type selector clusterIP clusterIPs externalIPs externalName loadBalancerIP loadBalancerSourceRanges "
                "loadBalancerClass allocateLoadBalancerNodePorts externalTrafficPolicy internalTrafficPolicy "
                "trafficDistribution healthCheckNodePort publishNotReadyAddresses sessionAffinity ipFamilies "
                "ipFamilyPolicy"
            ),
            "ports": _leaves("name protocol port targetPort nodePort appProtocol"),
            "sessionAffinityConfig": {"clientIP": _leaves("timeoutSeconds")},
        },
        "status": None,
    },
    "EndpointSlice": {
        **_TOP,
        "addressType": None,
        "endpoints": {
            **_leaves("addresses hostname nodeName zone hints targetRef deprecatedTopology"),
            "conditions": _leaves("ready serving terminating"),
        },
        "ports": _ENDPOINT_PORT,
    },
    "Endpoints": {
        **_TOP,
        "subsets": {"addresses": _ENDPOINT_ADDRESS, "notReadyAddresses": _ENDPOINT_ADDRESS, "ports": _ENDPOINT_PORT},
    },
    # The proxy reads few of these fields, and Kubernetes adds some with every release.
    "Pod": {**_TOP, **_leaves("spec status")},
    "Node": {**_TOP, **_leaves("spec status")},
}


def kind_errors(kind: str) -> Iterator[ConfigError]:
    """Yield an error if *kind* looks like a misspelt one, which `run` would skip."""
    match = _closest(kind, api.KINDS, cutoff=_CLOSE_KIND)
    if match and kind not in api.KINDS:
        yield ConfigError(f"{kind!r} is no kind that a proxy reads", field="kind", fix=f"did you mean {match}?")


def field_errors(kind: str, plain: Mapping[str, Any]) -> Iterator[ConfigError]:
    """Yield the errors in the head of *plain*, an object of *kind*, and its unknown and misplaced fields."""
    tree = _FIELDS[kind]
    yield from _version_errors(kind, plain)
    if kind != "Service":  # decode checks the names of Services
        yield from _name_errors(plain["metadata"])
    for here, key, siblings in _unknown(tree, plain, ()):
        yield _unknown_field(kind, tree, siblings, key, here)
    if kind == "Service":
        yield from _fields_under_selector(tree, plain)


def _version_errors(kind: str, plain: Mapping[str, Any]) -> Iterator[ConfigError]:
    versions = _VERSIONS.get(kind, ("v1",))
    version = plain.get("apiVersion")
    is_misspelt = version is None and any(str(key).lower() == "apiversion" for key in plain)
    if version not in versions and not is_misspelt:
        reason = f"{version!r} has no {kind}" if version is not None else "the apiVersion is missing"
        yield ConfigError(reason, field="apiVersion", fix=f"write 'apiVersion: {versions[0]}'")


def _name_errors(metadata: Mapping[str, Any]) -> Iterator[ConfigError]:
    for key in ("name", "namespace"):
        name = metadata.get(key)
        if isinstance(name, str) and not SUBDOMAIN.fullmatch(name):
            suggestion = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "web"
            fix = f"use small letters, digits, '-' and '.', such as {suggestion!r}"
            yield ConfigError(f"{name!r} is not a valid name", field=f"metadata.{key}", fix=fix)


def _unknown(tree: _Tree, given: object, steps: tuple[str | int, ...]) -> Iterator[tuple[str, str, _Tree]]:
    """Yield each unknown field in *given*, the value at *steps*: its path, its name, and the fields known beside it."""
    if isinstance(given, list):
        for index, item in enumerate(given):
            yield from _unknown(tree, item, (*steps, index))
    elif isinstance(given, dict):
        for key, value in given.items():
            if key not in tree:
                yield api.field_of((*steps, key)), str(key), tree
            elif (subtree := tree[key]) is not None:
                yield from _unknown(subtree, value, (*steps, key))


def _unknown_field(kind: str, whole: _Tree, tree: _Tree, key: str, here: str) -> ConfigError:
    if error := api.key_space_error(key, here):
        return error
    if homes := list(_homes(whole, key)):
        return _misplaced(key, here, homes)
    a_kind = f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind}"
    if here == "spec":
        return ConfigError(f"{a_kind} has no field 'spec'", field=here, fix="move what is in it to the top level")
    similar = next((name for name in _NAMES_ELSEWHERE.get(key, ()) if name in tree), None)
    if match := similar or _closest(key, tree):
        return ConfigError(f"{a_kind} has no field {key!r} here", field=here, fix=f"did you mean {match!r}?")
    if match := _closest(key, _all_names(whole)):
        homes = list(_homes(whole, match))
        reason = f"{a_kind} has no field {key!r}"
        return ConfigError(reason, field=here, fix=f"did you mean {match!r}? It belongs {_under(homes)}")
    fix = f"remove it, or write one of {', '.join(list(tree)[:20])}"
    return ConfigError(f"{a_kind} has no field {key!r} here", field=here, fix=fix)


def is_similar(unknown: ConfigError, name: str) -> bool:
    """Return whether *unknown*, an error of `field_errors`, is a misspelt *name*."""
    key = unknown.field.rpartition(".")[2]
    return repr(name) in unknown.fix or key.strip("-\u00a0").partition(":")[0] == name


def _misplaced(key: str, here: str, homes: list[str]) -> ConfigError:
    parent, _, _ = here.rpartition(".")
    stands = f"under {parent!r}" if parent else "at the top level"
    return ConfigError(
        f"{key!r} stands {stands}, but belongs {_under(homes)}",
        field=here,
        fix=f"move it there: {_columns(homes[0])}",
    )


def _under(homes: list[str]) -> str:
    return " or ".join(
        "at the top level"
        if not home
        else f"into an item of {home[:-2]!r}"
        if home.endswith("[]")
        else f"under {home!r}"
        for home in homes
    )


def _columns(home: str) -> str:
    if not home:
        return "it begins in the first column"
    return f"it begins two columns to the right of {home.removesuffix('[]').rpartition('.')[2]!r}"


def _fields_under_selector(whole: _Tree, plain: Mapping[str, Any]) -> Iterator[ConfigError]:
    """Yield the fields indented into the selector by mistake, where any key is a valid label."""
    spec = plain.get("spec")
    selector = spec.get("selector") if isinstance(spec, dict) else None
    for key, value in selector.items() if isinstance(selector, dict) else ():
        # Labels may be called name or type. Report only keys that cannot be meant as labels.
        is_field = any(name.isupper() for name in str(key)) and key in set(_all_names(whole))
        if isinstance(value, str) and (is_field or (key == "type" and value in _SERVICE_TYPES)):
            yield _misplaced(key, api.below("spec.selector", key), list(_homes(whole, key)))


def _closest(key: str, names: Iterable[str], cutoff: float = _CLOSE) -> str | None:
    by_small = {name.lower(): name for name in names}
    match = get_close_matches(key.lower(), by_small, n=1, cutoff=cutoff)
    return by_small[match[0]] if match else None


def _homes(tree: _Tree, key: str) -> Iterator[str]:
    """Yield the paths below which *key* exists; a list's path ends in ``[]``."""
    return (home for name, home in _names_and_homes(tree, "") if name == key)


def _all_names(tree: _Tree) -> Iterator[str]:
    return (name for name, _ in _names_and_homes(tree, ""))


def _names_and_homes(tree: _Tree, home: str) -> Iterator[tuple[str, str]]:
    """Yield each field of *tree* with the path below which it exists."""
    for name, subtree in tree.items():
        yield name, home
        if subtree is not None:
            below = f"{api.below(home, name)}[]" if name in _LISTS else api.below(home, name)
            yield from _names_and_homes(subtree, below)
