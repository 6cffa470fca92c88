"""Messages of a size that takes no packet's time."""

from __future__ import annotations

import pytest

from userspace_proxy.dataplane import wire
from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.listeners import Backends
from userspace_proxy.model.names import L4Protocol, ListenerName, NamespacedName, ServicePortName


def given(ports: int, endpoints: int) -> list[tuple[ListenerName, Backends]]:
    """Return a Service of many ports, as the worker gets it."""
    many = tuple(Endpoint(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}", 8080) for n in range(endpoints))
    service = NamespacedName("shop", "web")
    names = [ListenerName(ServicePortName(service, f"p{port}", L4Protocol.TCP)) for port in range(ports)]
    return [(name, Backends(many, many)) for name in names]


@pytest.mark.parametrize(("ports", "endpoints", "messages"), [(100, 1, 4), (32, 300, 7), (5, 3_000, 5)])
def test_items_are_told_in_as_many_messages_as_their_number_and_size_ask_for(
    ports: int, endpoints: int, messages: int
) -> None:
    items = given(ports, endpoints)

    told = list(wire.fitting(items, 32, wire.Update))

    assert [item for message in told for item in message.backends] == items
    assert all(len(wire.encode(one)) <= wire.FRAME_BYTES or len(one.backends) == 1 for one in told)
    assert messages <= len(told) <= 2 * messages


def test_nothing_to_tell_is_no_message() -> None:
    assert list(wire.fitting([], 32, wire.Update)) == []
