"""What the pickers of a service port have learnt, for another process."""

from __future__ import annotations

import itertools

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


def test_endpoints_that_come_together_are_one_group_of_the_slow_start() -> None:
    """A choice looks at each group."""
    clock = itertools.count(1.0)
    memory = Memory(lambda: next(clock), slow_start_s=30.0)
    picker = Picker(memory)
    picker.set_endpoints([ENDPOINT])

    picker.set_endpoints([ENDPOINT, *(Endpoint(f"10.0.0.{number}", 80) for number in range(2, 6))])

    assert (len(memory.starting), len(set(memory.starting.values()))) == (4, 1)


def test_what_a_service_port_learns_is_not_known_to_others() -> None:
    """Their dicts are the same until the first entry."""
    one, other = (Memory(lambda: 0.0, affinity_timeout_s=10, slow_start_s=5.0) for _ in range(2))
    Picker(one).set_endpoints([ENDPOINT])
    one.pin(CLIENT, Pin(ENDPOINT.address, 5.0))
    one.eject(ENDPOINT.address)
    one.end_ejection(ENDPOINT.address)
    one.eject(ENDPOINT.address)
    one.eject_for(CLIENT, ENDPOINT.address)
    one.note_overtaken(("10.0.0.2", 80))
    one.note_failure(ENDPOINT.address, "refused")
    one.counters_of(ENDPOINT.address)

    def entries(memory: Memory) -> list[int]:
        its = (memory.pins, memory.ejected, memory.ejected_for, memory.last_failures, memory.starting)
        return [len(each) for each in (*its, memory._overtaken, memory._counters, memory._new_pins or ())]

    assert entries(one) == [1, 1, 1, 1, 1, 1, 1, 0]
    assert entries(other) == [0] * 8
    with pytest.raises(TypeError, match="all service ports share"):
        other.pins[CLIENT] = Pin(ENDPOINT.address, 5.0)
