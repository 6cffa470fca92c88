"""What the pickers of a service port have learnt, for another process."""

from __future__ import annotations

import pytest

from userspace_proxy.dataplane import memory as memory_module
from userspace_proxy.dataplane.memory import EJECT_S, Memory, PickerMemory, Pin
from userspace_proxy.dataplane.picker import Picker
from userspace_proxy.model.endpoint import Endpoint

ENDPOINT = Endpoint("10.0.0.1", 80)
CLIENT = "10.98.0.1"


@pytest.fixture
def memory() -> Memory:
    return Memory(lambda: 0.0, affinity_timeout_s=10)


@pytest.fixture(autouse=True)
def picker(memory: Memory) -> Picker:
    picker = Picker(memory)
    picker.set_endpoints([ENDPOINT])
    take_news(memory)
    return picker


def take_news(memory: Memory) -> PickerMemory | None:
    """Return what is new, as a worker asks for it. Another question finds nothing."""
    news = memory.take_news() if memory.has_learnt else None
    assert not memory.has_learnt
    return news


def test_a_pin_is_news_once(memory: Memory) -> None:
    memory.pin(CLIENT, Pin(ENDPOINT.address, 5.0))

    assert take_news(memory) == PickerMemory([(CLIENT, Pin(ENDPOINT.address, 5.0))], [])
    assert take_news(memory) is None


def test_pins_that_no_process_asks_for_take_no_more_room_than_all_pins(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_module, "PINS_MAX", 2)
    for client in range(6):
        memory.pin(f"10.98.0.{client}", Pin(ENDPOINT.address, 5.0))
        memory.forget_old_pins(0.0)
        assert len(memory._new_pins or ()) <= 2

    news = take_news(memory)
    assert news is not None
    assert [client for client, _ in news.pins] == ["10.98.0.4", "10.98.0.5"]


def test_an_ejection_and_its_end_are_news(memory: Memory) -> None:
    memory.eject(ENDPOINT.address)
    assert take_news(memory) == PickerMemory([], [(ENDPOINT.address, 1, EJECT_S)])

    memory.end_ejection(ENDPOINT.address)
    assert take_news(memory) == PickerMemory([], [])


def test_the_ejection_of_a_removed_endpoint_is_news(picker: Picker, memory: Memory) -> None:
    memory.eject(ENDPOINT.address)
    take_news(memory)

    picker.set_endpoints([])

    assert take_news(memory) == PickerMemory([], [])
