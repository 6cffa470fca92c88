"""Plans of userspace mode for a state: listeners, their endpoints, and rules by portal and sender."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.listeners import ListenerSpec
from userspace_proxy.model.names import L4Protocol, ListenerName, NamespacedName, Scope, ServicePortName
from userspace_proxy.model.redirects import DROPPED, PodDetector
from userspace_proxy.model.routes import Refusal, Sender
from userspace_proxy.model.service import ConnectionPolicy, Portal, ServicePort, SourceIP, node_portal
from userspace_proxy.model.state import ProxyState
from userspace_proxy.model.topology import Node
from userspace_proxy.modes.plans import NodeRules, plan
from userspace_proxy.modes.userspace.redirects import RedirectTranslator

TCP = L4Protocol.TCP
NAME = ServicePortName(NamespacedName("shop", "web"), "http", TCP)
OTHER = ServicePortName(NamespacedName("shop", "api"), "http", TCP)
CLUSTER, LOCAL = ListenerName(NAME), ListenerName(NAME, Scope.LOCAL)
HERE = Node("here", addresses=("192.0.2.1", "192.0.2.9", "2001:db8::1"))
NEAR = Endpoint("10.0.0.1", 80, node_name="here")
FAR = Endpoint("10.0.0.2", 80, node_name="there")
FAR6 = Endpoint("fd00::2", 80, node_name="there")
REFUSE = 29_999
PODS = NodeRules(pods=PodDetector(cidrs=("10.0.0.0/8",)))

CLUSTER_IP = Portal("10.96.0.1", 80, TCP)
CLUSTER_IP6 = Portal("fd00:96::1", 80, TCP)
VIP = Portal("203.0.113.7", 80, TCP)
NODE_PORT = node_portal(4, 30_080, TCP)


@dataclass
class Made:
    """The rules of all service ports, by portal."""

    names: dict[Portal, ServicePortName] = field(default_factory=dict)
    ports: dict[Portal, int] = field(default_factory=dict)
    exceptions: dict[Sender, dict[Portal, int]] = field(default_factory=dict)
    allowed: dict[Portal, tuple[str, ...]] = field(default_factory=dict)


def made(
    *given: ServicePort, of: tuple[Endpoint, ...], rules: NodeRules = PODS, opened: set[ListenerName] | None = None
) -> Made:
    """Return the rules for *given*, with proxy ports counted from 10,000 in the order of the listeners."""
    translator, found = RedirectTranslator(rules), Made()
    translator.plan(ProxyState({p.name: p for p in given}, {p.name: of for p in given}, HERE))
    translator.refuse_port = REFUSE
    listeners = [(each, name) for each in given for name in translator.plans.held[each.name].listeners]
    for number, (service_port, name) in enumerate(listeners):
        if opened is None or name in opened:
            translator.open(ListenerSpec(service_port, 10_000 + number, name.scope, name.transparent))
    translator.translate()
    for owner, translation in translator.translations.items():
        for (portal, sender, _), port in zip(translation.routes, translation.ports, strict=True):
            ports = found.ports if sender is Sender.ANYBODY else found.exceptions.setdefault(sender, {})
            ports[portal] = port
            found.names[portal] = owner
        found.allowed |= translation.allowed
    return found


def test_a_service_port_without_policies_has_one_listener_and_no_exceptions() -> None:
    given = ServicePort(NAME, 80, ("10.96.0.1",), node_port=30_080)

    rules = made(given, of=(NEAR, FAR))

    assert rules.ports == {CLUSTER_IP: 10_000, NODE_PORT: 10_000}
    assert not rules.exceptions


def test_each_family_is_refused_by_itself() -> None:
    given = ServicePort(NAME, 80, ("10.96.0.1", "fd00:96::1"))

    assert made(given, of=(FAR6,)).ports == {CLUSTER_IP: REFUSE, CLUSTER_IP6: 10_000}


def test_clients_that_may_wait_are_led_to_the_empty_listener_but_not_in_kernel_modes() -> None:
    given = ServicePort(NAME, 80, ("10.96.0.1",), connections=ConnectionPolicy(wait_s=30.0))

    assert made(given, of=()).ports == {CLUSTER_IP: 10_000}
    kernel = plan(given, (), HERE, detects_pods=True, in_kernel=True)
    assert {route.to for route in kernel.routes} == {Refusal.REJECT}


def test_with_external_policy_local_only_internal_clients_reach_remote_endpoints() -> None:
    given = ServicePort(NAME, 80, ("10.96.0.1",), node_port=30_080, external_local=True)

    rules = made(given, of=(NEAR, FAR))

    cluster, local = rules.ports[CLUSTER_IP], rules.ports[NODE_PORT]
    assert cluster != local
    assert rules.exceptions == {Sender.POD: {NODE_PORT: cluster}, Sender.NODE: {NODE_PORT: cluster}}


def test_packets_are_dropped_without_local_endpoints_and_refused_without_any() -> None:
    given = ServicePort(NAME, 80, ("10.96.0.1",), load_balancer_ips=("203.0.113.7",), external_local=True)

    assert made(given, of=(FAR,)).ports == {CLUSTER_IP: 10_000, VIP: DROPPED}
    assert made(given, of=()).ports == {CLUSTER_IP: REFUSE, VIP: REFUSE}


def test_a_listener_stays_though_no_route_leads_there_now() -> None:
    """The proxy port lasts as long as the service port, so conntrack's entries stay valid."""
    given = ServicePort(NAME, 80, ("10.96.0.1",), node_port=30_080, external_local=True)

    assert set(plan(given, (), HERE, detects_pods=False).listeners) == {CLUSTER, LOCAL}


def test_each_listener_gets_the_endpoints_of_its_scope_and_all_that_flows_may_stay_at() -> None:
    given = ServicePort(NAME, 80, ("10.96.0.1", "fd00:96::1"), node_port=30_080, external_local=True)
    leaving = Endpoint("10.0.0.3", 80, ready=False, terminating=True, node_name="there")

    listeners = plan(given, (NEAR, FAR, FAR6, leaving), HERE, detects_pods=False).listeners

    assert listeners[CLUSTER].usable == (NEAR, FAR, FAR6)
    assert listeners[LOCAL].usable == (NEAR,)
    assert listeners[LOCAL].serving == (NEAR, FAR, FAR6, leaving)


def test_a_portal_whose_listener_could_not_be_opened_has_no_rule() -> None:
    given = ServicePort(NAME, 80, ("10.96.0.1",), node_port=30_080, external_local=True)

    assert made(given, of=(NEAR,), opened={LOCAL}).ports == {NODE_PORT: 10_001}


def test_the_first_of_two_claimants_has_the_portal_for_every_sender() -> None:
    first = ServicePort(NAME, 80, ("10.96.0.1",), load_balancer_ips=("203.0.113.7",))
    second = ServicePort(OTHER, 80, ("10.96.0.2",), load_balancer_ips=("203.0.113.7",), external_local=True)

    rules = made(first, second, of=(NEAR,))

    assert rules.names[VIP] == NAME
    assert rules.ports[VIP] == 10_000
    assert not rules.exceptions


def test_source_ranges_are_about_load_balancer_addresses_alone() -> None:
    given = ServicePort(
        NAME, 80, ("10.96.0.1",), 30_080, load_balancer_ips=("203.0.113.7",), source_ranges=("198.51.100.0/24",)
    )

    assert made(given, of=(NEAR,)).allowed == {VIP: ("198.51.100.0/24",)}


def test_source_ranges_of_one_family_do_not_restrict_the_other() -> None:
    """P4: kube-proxy applies source ranges by family."""
    given = ServicePort(
        NAME,
        80,
        ("10.96.0.1", "fd00:96::1"),
        load_balancer_ips=("203.0.113.7", "2001:db8::7"),
        source_ranges=("198.51.100.0/24",),
    )

    assert made(given, of=(NEAR, FAR6)).allowed == {VIP: ("198.51.100.0/24",)}


def test_a_range_with_this_node_in_it_allows_the_address_that_the_node_has_there() -> None:
    """P4."""
    given = ServicePort(NAME, 80, ("10.96.0.1",), load_balancer_ips=("203.0.113.7",), source_ranges=("192.0.2.0/24",))

    assert made(given, of=(NEAR,)).allowed == {VIP: ("192.0.2.0/24", "203.0.113.7/32")}


@pytest.mark.parametrize("detects", [True, False])
def test_a_transparent_service_port_keeps_addresses_of_pods_or_of_all_clients_without_a_detector(detects: bool) -> None:
    given = ServicePort(NAME, 80, ("10.96.0.1",), source_ip=SourceIP.TRANSPARENT)
    replaced, kept = ListenerName(NAME), ListenerName(NAME, transparent=True)

    planned = plan(given, (NEAR,), HERE, detects_pods=detects)

    assert {(route.sender, route.to) for route in planned.routes} == (
        {(Sender.ANYBODY, replaced), (Sender.POD, kept)}
        if detects
        else {(Sender.ANYBODY, kept), (Sender.NODE, replaced)}
    )


def test_primary_node_ports_are_on_the_first_address_of_each_family() -> None:
    rules = NodeRules(node_port_addresses=("primary",))

    assert set(rules.node_ports_on(HERE)) == {"192.0.2.1/32", "2001:db8::1/128"}


def test_the_nodes_pod_cidrs_can_detect_pods() -> None:
    rules = NodeRules(pods_by_node=True)

    assert rules.detector(HERE) is None
    assert rules.detector(Node("here", pod_cidrs=("10.0.1.0/24",))) == PodDetector(cidrs=("10.0.1.0/24",))


def test_health_checks_are_answered_at_the_addresses_that_node_ports_are_kept_to() -> None:
    def ips(*cidrs: str) -> tuple[str, ...]:
        return NodeRules(node_port_addresses=cidrs).node_port_ips(HERE)

    assert ips() == ()
    assert ips("primary") == ("192.0.2.1", "2001:db8::1")
    assert ips("192.0.2.8/29", "127.0.0.0/8") == ("192.0.2.9", "127.0.0.1")
    assert ips("0.0.0.0/0") == ips("0.0.0.0/0", "192.0.2.8/29", "::/0") == ()
    assert ips("0.0.0.0/0", "2001:db8::/64") == (*HERE.addresses, "127.0.0.1")


def test_a_change_of_endpoints_changes_no_rule_of_userspace_mode_except_for_the_first_and_the_last() -> None:
    given = ServicePort(NAME, 80, ("10.96.0.1",))
    translator = RedirectTranslator(PODS)
    translator.open(ListenerSpec(given, 10_000))
    seen = []
    for endpoints in ((), (NEAR,), (NEAR, FAR), (FAR,), ()):
        translator.plan(ProxyState({NAME: given}, {NAME: endpoints}, HERE))
        translator.translate()
        translator.plans.finish()
        seen.append(bool(translator.unloaded))
        translator.unloaded = {}

    assert seen == [True, True, False, False, True]
