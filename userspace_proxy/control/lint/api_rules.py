"""What the API server refuses of the fields that a proxy reads, as tables; docs/reference/contract.md shows them. Pure.

They follow pkg/apis/core/validation and pkg/apis/discovery/validation of Kubernetes 1.36. A rule without a test is one
that `run` refuses by as well: decode has it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from userspace_proxy import api
from userspace_proxy.control import decode
from userspace_proxy.control.pools import NODE_PORTS
from userspace_proxy.errors import ConfigError

_Plain = Mapping[str, Any]

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
# RFC 6335: what a named port may be called.
_PORT_NAME = re.compile(r"(?=.{1,15}$)(?=.*[a-z])[a-z0-9]+(-[a-z0-9]+)*")
_LABEL_VALUE = re.compile(r"(?=.{0,63}$)([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
_QUALIFIED = re.compile(
    r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?(?=[^/]{1,63}$)[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"
)


class Rule(NamedTuple):
    """What values of one field are refused.

    ``field``: as in ``spec.ports[].port``; ``.*`` means each value of a mapping, ``.{}`` each key. ``demand``: what the
    API server wants, for people. ``wrong``: a value that it refuses. ``is_right``: None where decode finds it.
    """

    field: str
    demand: str
    wrong: object
    is_right: Callable[[Any], object] | None = None
    mend: str = ""


def _one_of(field: str, *names: str) -> Rule:
    wanted = ", ".join(names[:-1]) + f" or {names[-1]}"
    return Rule(field, wanted, names[-1].swapcase(), lambda value: value in names, f"write {wanted}")


# What several fields hold: the demand, a wrong value, the test and the mend of a Rule.
_NUMBER = ("a number from 1 to 65535", 65_536, decode.is_port, "write a number from 1 to 65535")
_SYMBOLS = "use letters, digits, '-', '_' and '.', 63 at most"
_NAME = ("a qualified name", "a b", _QUALIFIED.fullmatch, f"{_SYMBOLS}; a domain and '/' may stand before it")
_VALUE = ("a label's value", "a b", _LABEL_VALUE.fullmatch, _SYMBOLS)
_NODE = ("a name (DNS-1123)", "Node_1", _SUBDOMAIN.fullmatch, "use small letters, digits, '-' and '.'")
_CIDR = ("a range of addresses (CIDR)", "10.1.0.0", decode.is_cidr, "write one such as 10.244.1.0/24")
_NAMED = ("a label (DNS-1123)", "Http", _LABEL.fullmatch, "use small letters, digits and '-', 63 at most")
_PORT = ("a port's name", "Http", _PORT_NAME.fullmatch, "use small letters, digits and '-', 15 at most")
_RANGE = f"a number from {NODE_PORTS.start} to {NODE_PORTS.stop - 1}"


def _is_target_port(value: object) -> object:
    return not isinstance(value, str) or value.isdigit() or _PORT_NAME.fullmatch(value)


def _is_host_name(value: str) -> object:
    return _SUBDOMAIN.fullmatch(value.removesuffix("."))


def _port_rules(field: str) -> tuple[Rule, ...]:
    """Return the rules of a port of an EndpointSlice or of Endpoints."""
    return (
        Rule(f"{field}.name", *_NAMED),
        _one_of(f"{field}.protocol", "TCP", "UDP", "SCTP"),
        Rule(f"{field}.port", *_NUMBER),
        Rule(f"{field}.appProtocol", *_NAME),
    )


def _container_rules(field: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{field}.name", *_PORT),
        _one_of(f"{field}.protocol", "TCP", "UDP", "SCTP"),
        Rule(f"{field}.containerPort", *_NUMBER),
    )


_COMMON = (
    Rule("metadata.labels.{}", *_NAME),
    Rule("metadata.labels.*", *_VALUE),
    Rule("metadata.annotations.{}", "a qualified name", "a b", lambda key: _QUALIFIED.fullmatch(key.lower()), _NAME[3]),
)

RULES: Mapping[str, tuple[Rule, ...]] = {
    "Service": (
        Rule("metadata.name", "a label (DNS-1123)", "My_Web"),
        *_COMMON,
        Rule("spec.type", "ClusterIP, NodePort, LoadBalancer or ExternalName", "Nodeport"),
        Rule("spec.selector.{}", *_NAME),
        Rule("spec.selector.*", *_VALUE),
        Rule("spec.ports[].name", "a label (DNS-1123); of several ports each has its own", "Http"),
        Rule("spec.ports[].protocol", "TCP, UDP or SCTP; one number a protocol once", "udp"),
        Rule("spec.ports[].port", "a number from 1 to 65535", 65_536),
        Rule("spec.ports[].targetPort", "a port's number or name", "Http", _is_target_port, _PORT[3]),
        Rule("spec.ports[].nodePort", _RANGE, 8080, lambda value: not value or value in NODE_PORTS, f"write {_RANGE}"),
        Rule("spec.ports[].appProtocol", *_NAME),
        Rule("spec.clusterIP", "an address that a Service can have, or None", "none"),
        Rule("spec.clusterIPs", "one address a family, the first that of clusterIP", ["10.96.0.2"]),
        _one_of("spec.ipFamilyPolicy", "SingleStack", "PreferDualStack", "RequireDualStack"),
        Rule("spec.ipFamilies", "IPv4 and IPv6, each once, in the order of clusterIPs", ["ipv4"]),
        Rule("spec.externalIPs[]", "an address that a Service can have", "127.0.0.1"),
        Rule(
            "spec.externalName", "a host name", "http://a.b/", _is_host_name, "write no scheme, port, path or capital"
        ),
        Rule("spec.sessionAffinity", "ClientIP or None", "clientIP"),
        Rule("spec.internalTrafficPolicy", "Cluster or Local", "local"),
        Rule("spec.externalTrafficPolicy", "Cluster or Local", "local"),
        _one_of("spec.trafficDistribution", "PreferClose", "PreferSameZone", "PreferSameNode"),
        Rule("spec.loadBalancerClass", *_NAME),
        Rule("spec.loadBalancerSourceRanges[]", "a range of addresses (CIDR)", "10.1.0.0"),
        Rule("spec.healthCheckNodePort", "a node port that no port of the Service has", 70_000),
        _one_of("status.loadBalancer.ingress[].ipMode", "VIP", "Proxy"),
    ),
    "EndpointSlice": (
        *_COMMON,
        _one_of("addressType", "IPv4", "IPv6", "FQDN"),
        Rule("endpoints[].nodeName", *_NODE),
        Rule("endpoints[].hints.forZones[].name", *_VALUE),
        Rule("endpoints[].hints.forNodes[].name", *_NODE),
        *_port_rules("ports[]"),
    ),
    "Endpoints": (
        *_COMMON,
        Rule("subsets[].addresses[].nodeName", *_NODE),
        *_port_rules("subsets[].ports[]"),
    ),
    "Pod": (
        *_COMMON,
        Rule("spec.nodeName", *_NODE),
        *_container_rules("spec.containers[].ports[]"),
        *_container_rules("spec.initContainers[].ports[]"),
    ),
    "Node": (
        *_COMMON,
        Rule("spec.podCIDR", *_CIDR),
        Rule("spec.podCIDRs[]", *_CIDR),
        Rule("spec.taints[].key", *_NAME),
    ),
}


def value_errors(kind: str, plain: _Plain) -> Iterator[ConfigError]:
    """Yield the values in *plain*, an object of *kind*, that the API server refuses and decode does not."""
    for rule in RULES[kind]:
        if rule.is_right is not None:
            for field, value in values_at(plain, rule.field):
                is_of_type = isinstance(value, type(rule.wrong))  # another is refused for that
                if is_of_type and value != "" and not rule.is_right(value):
                    yield ConfigError(f"{value!r} is not {rule.demand}", field=field, mend=rule.mend)


def values_at(plain: object, path: str, field: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (field, value) for each value of *plain* that *path* means."""
    step, _, rest = path.partition(".")
    name, is_list = step.removesuffix("[]"), step.endswith("[]")
    if not isinstance(plain, Mapping):
        return
    if name in ("*", "{}"):
        for key, value in plain.items():
            yield api.below(field, key), key if name == "{}" else value
        return
    value, here = plain.get(name), api.below(field, name)
    items = enumerate(value) if is_list and isinstance(value, list) else () if is_list else [(-1, value)]
    for index, item in items:
        at = f"{here}[{index}]" if is_list else here
        if rest:
            yield from values_at(item, rest, at)
        elif item is not None:
            yield at, item
