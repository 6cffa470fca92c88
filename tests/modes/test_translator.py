"""Translations of the desired state, in every mode: which service port has a portal, and what is not loaded yet."""

from __future__ import annotations

import pytest

from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.listeners import ListenerSpec
from userspace_proxy.model.names import L4Protocol, NamespacedName, ServicePortName
from userspace_proxy.model.service import Portal, ServicePort
from userspace_proxy.model.state import ProxyState
from userspace_proxy.modes.kernel_proxier import KernelTranslator
from userspace_proxy.modes.kernel_rules import portals_of
from userspace_proxy.modes.plans import NodeRules
from userspace_proxy.modes.translator import Translator
from userspace_proxy.modes.userspace.redirects import RedirectTranslator

IP, OTHER_IP = "10.96.0.1", "10.96.0.2"
PORTAL = Portal(IP, 80, L4Protocol.TCP)
A, B, C = (ServicePortName(NamespacedName("ns", each), "", L4Protocol.TCP) for each in "abc")


@pytest.fixture(params=[RedirectTranslator, KernelTranslator])
def translator(request: pytest.FixtureRequest) -> Translator:
    return request.param(NodeRules())  # type: ignore[no-any-return]


def translate(translator: Translator, given: dict[ServicePortName, ServicePort]) -> None:
    translator.plan(ProxyState(given, dict.fromkeys(given, (Endpoint("10.244.0.5", 8080),))))
    translator.translate()
    translator.plans.finish()


def desire(translator: Translator, ips: dict[ServicePortName, str]) -> dict[str, ServicePortName]:
    """Translate a state of service ports at these cluster IPs; return the owner of each address."""
    given = {name: ServicePort(name, 80, (ip,)) for name, ip in ips.items()}
    if isinstance(translator, RedirectTranslator):
        for number, name in enumerate((A, B, C)):
            translator.open(ListenerSpec(ServicePort(name, 80, (IP,)), 10_000 + number))
    translate(translator, given)
    owned = [(portal.ip, name) for name, made in translator.translations.items() for portal in portals_of(made)]
    assert len(dict(owned)) == len(owned), "each portal once"
    return dict(owned)


def test_the_first_of_several_claimants_has_a_portal_and_the_next_one_gets_it(translator: Translator) -> None:
    """Two Services have one cluster IP for a moment if one of them is from a saved state."""
    assert desire(translator, {A: IP, B: IP, C: IP}) == {IP: A}
    assert desire(translator, {A: OTHER_IP, B: IP, C: IP}) == {IP: B, OTHER_IP: A}
    assert desire(translator, {A: OTHER_IP, C: IP}) == {IP: C, OTHER_IP: A}
    assert desire(translator, {A: IP, C: IP}) == {IP: C}
    assert desire(translator, {A: IP}) == {IP: A}


def test_a_claimant_that_goes_before_the_owner_gets_nothing(translator: Translator) -> None:
    assert desire(translator, {A: IP, B: IP}) == {IP: A}
    assert desire(translator, {A: IP}) == {IP: A}
    assert desire(translator, {}) == {}
    assert desire(translator, {B: IP}) == {IP: B}


def test_what_differs_is_known_with_what_is_loaded_until_it_is_loaded(translator: Translator) -> None:
    desire(translator, {A: IP, B: IP, C: OTHER_IP})
    assert translator.unloaded == {A: None, B: None, C: None}
    loaded, translator.unloaded = translator.translations[A], {}

    desire(translator, {A: IP, B: IP, C: OTHER_IP})
    assert translator.unloaded == {}

    desire(translator, {B: IP, C: OTHER_IP})
    desire(translator, {A: IP, B: IP, C: OTHER_IP})
    assert set(translator.unloaded) == {A, B}
    assert translator.unloaded[A] is loaded
    assert portals_of(translator.unloaded[B]) == set()
    assert portals_of(translator.translations[B]) == {PORTAL}


def test_a_listener_that_could_not_be_opened_before_gets_its_rules_when_it_opens() -> None:
    translator, given = RedirectTranslator(NodeRules()), ServicePort(A, 80, (IP,))
    translate(translator, {A: given})
    assert portals_of(translator.translations[A]) == set()

    translator.open(ListenerSpec(given, 10_000))
    translate(translator, {A: given})

    assert portals_of(translator.translations[A]) == {PORTAL}
