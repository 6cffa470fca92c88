"""The choice of the next local port; time is a parameter."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from userspace_proxy.dataplane.local_ports import LocalPorts, first_index, local_ports, parse_ports

REST_S = 30.0


def take(ports: LocalPorts, now: float, *, has_few: bool = True) -> int | None:
    return ports.take(now, has_few=has_few)


def test_ports_that_were_never_used_come_first_and_then_the_longest_rested() -> None:
    ports = LocalPorts(range(100, 104), 2)
    assert [take(ports, 0) for _ in range(4)] == [102, 103, 100, 101]
    for port, until in ((100, 33), (103, 31), (101, 32)):
        ports.rest(port, until)

    assert [take(ports, now) for now in (30.9, 31, 31.5, 40, 40, 40)] == [None, 103, None, 101, 100, None]


def test_the_last_ports_are_for_clients_that_have_few_flows() -> None:
    ports = LocalPorts(range(100, 164), 0)
    taken = [take(ports, 0, has_few=False) for _ in range(64)]
    assert taken[61:] == [161, None, None]
    assert [take(ports, 0) for _ in range(3)] == [162, 163, None]


def test_ports_that_another_process_used_rest_too() -> None:
    ports = LocalPorts(range(100, 104), 0, {99, 101, 102}, free_at=30)
    assert [take(ports, 29) for _ in range(3)] == [100, 103, None]
    assert [take(ports, 30) for _ in range(3)] == [101, 102, None]


def test_ports_that_another_process_continues_to_use_rest_too() -> None:
    """The other process is still running when the first flow begins, but not when its ports are reached."""
    asked = []

    def look() -> tuple[set[int], float]:
        asked.append(True)
        return {100, 101, 102, 104}, 40  # 104 is ours: one cannot see from outside whose it is

    ports = LocalPorts(range(100, 106), 4, {100, 101}, free_at=30, look=look)
    assert [take(ports, 0) for _ in range(2)] == [104, 105]
    assert not asked
    assert [take(ports, 0) for _ in range(2)] == [103, None]
    assert [take(ports, 40) for _ in range(4)] == [100, 101, 102, None]
    assert len(asked) == 1


def test_a_new_source_address_costs_the_same_for_any_number_of_ports() -> None:
    reads: list[object] = []

    class Ports(Sequence[int]):
        def __getitem__(self, index: Any) -> Any:
            reads.append(index)
            return range(1, 60_000)[index]

        def __len__(self) -> int:
            return 59_999

    LocalPorts(Ports(), 0, never=30_000)

    assert len(reads) < 20


def test_the_endpoints_own_port_is_never_used() -> None:
    ports = LocalPorts(range(100, 103), 1, {102}, free_at=5, never=101)
    assert [take(ports, 0) for _ in range(2)] == [100, None]
    assert [take(ports, 5) for _ in range(2)] == [102, None]


@pytest.mark.parametrize(
    ("taken", "first"), [({0}, 6), ({0, 1, 2}, 7), ({3, 10}, 7), ({1, 7}, 10), (set(range(12)), 0)]
)
def test_a_successor_starts_far_behind_the_ports_in_use(taken: set[int], first: int) -> None:
    assert first_index(range(12), taken) == first


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 20)), max_size=60))
def test_no_port_is_used_within_its_rest(steps: list[tuple[bool, float]]) -> None:
    ports, now = LocalPorts(range(100, 104), 0), 0.0
    held: list[int] = []
    ended_at: dict[int, float] = {}
    for begins, pause_s in steps:
        now += pause_s
        if not begins and held:
            ended_at[port := held.pop(0)] = now
            ports.rest(port, now + REST_S)
        elif (taken := take(ports, now)) is not None:
            assert taken not in held
            assert now >= ended_at.get(taken, -REST_S) + REST_S
            held.append(taken)
        else:
            assert len(held) + sum(now < at + REST_S for port, at in ended_at.items() if port not in held) == 4
    assert ports.is_idle(now) == (not held and all(now >= at + REST_S for at in ended_at.values()))


def test_workers_share_the_range_without_overlap() -> None:
    whole = local_ports()
    parts = [local_ports((worker, 3)) for worker in range(3)]
    assert sorted(port for part in parts for port in part) == sorted(whole)
    assert isinstance(whole, array)


@pytest.mark.parametrize(
    ("text", "ports"), [("\n", set()), ("8080\n", {8080}), ("8080,9000-9002", {8080, 9000, 9001, 9002})]
)
def test_reserved_ports_are_as_the_kernel_shows_them(text: str, ports: set[int]) -> None:
    assert parse_ports(text) == ports
