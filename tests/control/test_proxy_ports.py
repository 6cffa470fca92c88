"""Which ports are allocated as proxy ports."""

from __future__ import annotations

from userspace_proxy.control.proxy_ports import KUBERNETES_PORTS, ProxyPorts
from userspace_proxy.model.names import L4Protocol, ListenerName, NamespacedName, ServicePortName


def listener(number: int) -> ListenerName:
    return ListenerName(ServicePortName(NamespacedName("default", f"web{number}"), "", L4Protocol.TCP))


def test_the_ports_of_kubernetes_itself_and_reserved_ones_are_never_taken() -> None:
    remembered = {listener(0).key: 10_256}
    ports = ProxyPorts(10_245, 10_264, remembered, KUBERNETES_PORTS | {10_260, 10_261})

    taken = {ports.next_for(listener(number), set()) for number in range(7)} - {None}

    assert taken == {10_245, 10_246, 10_247, 10_262, 10_263, 10_264}
    assert ports.next_refusing(set()) is None
