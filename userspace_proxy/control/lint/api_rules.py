"""The API server's rules for the fields that a proxy reads, as tables; docs/reference/contract.md shows them. Pure.

They follow pkg/apis/core/validation and pkg/apis/discovery/validation of Kubernetes. A rule without a test is one that
decode checks, so `run` rejects the object as well.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from userspace_proxy import api
from userspace_proxy.control import decode
from userspace_proxy.control.fields import SUBDOMAIN
from userspace_proxy.control.pools import NODE_PORTS
from userspace_proxy.errors import ConfigError

_Plain = Mapping[str, Any]
_Steps = tuple[str | int, ...]

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
# RFC 6335: the name of a port.
_PORT_NAME = re.compile(r"(?=.{1,15}$)(?=.*[a-z])[a-z0-9]+(-[a-z0-9]+)*")
_LABEL_VALUE = re.compile(r"(?=.{0,63}$)([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
_QUALIFIED = re.compile(
    r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?(?=[^/]{1,63}$)[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"
)


class Rule(NamedTuple):
    """What the API server demands of the values of one field.

    ``field``: such as ``spec.ports[].port``; ``.*`` means each value of a mapping, ``.{}`` each key. ``demand``: for
    people. ``wrong``: an example of a value that is refused. ``is_right``: the test of a value, or None if decode
    has it. ``fix``: how to repair a wrong value.
    """

    field: str
    demand: str
    wrong: object
    is_right: Callable[[Any], object] | None = None
    fix: str = ""


def _one_of(field: str, *names: str) -> Rule:
    wanted = ", ".join(names[:-1]) + f" or {names[-1]}"
    return Rule(field, wanted, names[-1].swapcase(), lambda value: value in names, f"write {wanted}")


# The demand, a wrong value, the test and the fix of rules for several fields.
_NUMBER = ("a number from 1 to 65535", 65_536, decode.is_port, "write a number from 1 to 65535")
_SYMBOLS = "use letters, digits, '-', '_' and '.', 63 at most"
_NAME = ("a qualified name", "a b", _QUALIFIED.fullmatch, f"{_SYMBOLS}; a domain and '/' may stand before it")
_VALUE = ("a label's value", "a b", _LABEL_VALUE.fullmatch, _SYMBOLS)
_NODE = ("a name (DNS-1123)", "Node_1", SUBDOMAIN.fullmatch, "use small letters, digits, '-' and '.'")
_CIDR = ("a range of addresses (CIDR)", "10.1.0.0", decode.is_cidr, "write one such as 10.244.1.0/24")
_NAMED = ("a label (DNS-1123)", "Http", _LABEL.fullmatch, "use small letters, digits and '-', 63 at most")
_PORT = ("a port's name", "Http", _PORT_NAME.fullmatch, "use small letters, digits and '-', 15 at most")
_RANGE = f"a number from {NODE_PORTS.start} to {NODE_PORTS.stop - 1}"


def _is_target_port(value: object) -> object:
    return not isinstance(value, str) or value.isdigit() or _PORT_NAME.fullmatch(value)


def _is_host_name(value: str) -> object:
    return SUBDOMAIN.fullmatch(value.removesuffix("."))


def _port_rules(field: str, name: tuple[Any, ...] = _NAMED, number: str = "port") -> tuple[Rule, ...]:
    """Return the rules of a port of an EndpointSlice, of Endpoints or of a container."""
    return (
        Rule(f"{field}.name", *name),
        _one_of(f"{field}.protocol", "TCP", "UDP", "SCTP"),
        Rule(f"{field}.{number}", *_NUMBER),
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
        Rule("ports[].appProtocol", *_NAME),
    ),
    "Endpoints": (
        *_COMMON,
        Rule("subsets[].addresses[].nodeName", *_NODE),
        *_port_rules("subsets[].ports[]"),
        Rule("subsets[].ports[].appProtocol", *_NAME),
    ),
    "Pod": (
        *_COMMON,
        Rule("spec.nodeName", *_NODE),
        *_port_rules("spec.containers[].ports[]", _PORT, "containerPort"),
        *_port_rules("spec.initContainers[].ports[]", _PORT, "containerPort"),
    ),
    "Node": (
        *_COMMON,
        Rule("spec.podCIDR", *_CIDR),
        Rule("spec.podCIDRs[]", *_CIDR),
        Rule("spec.taints[].key", *_NAME),
    ),
}


# What stands below a field (``[]``: each item of a list, ``{}`` and ``*`` as in `Rule`), or the rule for it.
_Tree = dict[str, "_Tree"] | Rule


def _tree(rules: Iterable[Rule]) -> _Tree:
    """Return the *rules* with a test as a tree, so that one walk over an object tests all of its values."""
    whole: dict[str, _Tree] = {}
    for rule in (rule for rule in rules if rule.is_right is not None):
        *above, last = rule.field.replace("[]", ".[]").split(".")
        tree = whole
        for step in above:
            below = tree.setdefault(step, {})
            assert isinstance(below, dict), "a rule is for a single value"
            tree = below
        tree[last] = rule
    return whole


_TREES = {kind: _tree(rules) for kind, rules in RULES.items()}


def value_errors(kind: str, plain: _Plain) -> list[ConfigError]:
    """Return an error for each value in *plain* (of *kind*) that the API server refuses, but `decode` accepts."""
    errors: list[ConfigError] = []
    _add_errors(errors, _TREES[kind], plain, ())
    return errors


def _add_errors(errors: list[ConfigError], tree: _Tree, given: object, steps: _Steps) -> None:
    """Add an error for each value that breaks a rule of *tree*; *given* is the value at *steps*."""
    if isinstance(tree, Rule):
        # A wrong type is an error of its own.
        if isinstance(given, type(tree.wrong)) and given != "" and tree.is_right and not tree.is_right(given):
            errors.append(ConfigError(f"{given!r} is not {tree.demand}", field=api.field_of(steps), fix=tree.fix))
    elif isinstance(given, dict):
        for step, below in tree.items():
            if step in ("{}", "*"):
                for key, value in given.items():
                    _add_errors(errors, below, key if step == "{}" else value, (*steps, str(key)))
            elif step in given:
                _add_errors(errors, below, given[step], (*steps, step))
    elif isinstance(given, list) and (each := tree.get("[]")) is not None:
        for index, item in enumerate(given):
            _add_errors(errors, each, item, (*steps, index))
