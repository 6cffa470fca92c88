"""The picker's promises: exact turns, pins that slide, and ejection of endpoints that fail."""

from __future__ import annotations

from collections.abc import Sequence

from tests.fakes import FakeClock
from userspace_proxy.dataplane.memory import EJECT_S, PINS_MAX, REFUSALS_OF_A_CLIENT_MAX, REFUSED_CLIENTS_MAX, Memory
from userspace_proxy.dataplane.picker import Picker
from userspace_proxy.model.endpoint import Address, Endpoint
from userspace_proxy.model.service import Balance

A, B, C, D = (Endpoint(f"10.0.0.{n}", 80) for n in range(1, 5))


def picker_over(*endpoints: Endpoint, clock: FakeClock, affinity_timeout_s: int | None = None) -> Picker:
    picker = Picker(Memory(clock, affinity_timeout_s))
    picker.set_endpoints(endpoints)
    return picker


def picks(picker: Picker, count: int, client_ip: str = "c") -> list[Endpoint | None]:
    return [choice.endpoint if (choice := picker.pick(client_ip)) else None for _ in range(count)]


def test_without_endpoints_there_is_nothing_to_pick(clock: FakeClock) -> None:
    assert picks(picker_over(clock=clock), 2) == [None, None]


def test_endpoints_take_turns_in_order(clock: FakeClock) -> None:
    assert picks(picker_over(A, B, C, clock=clock), 7) == [A, B, C, A, B, C, A]


def test_a_new_endpoint_is_last_in_its_first_round_and_keeps_the_order_of_others(clock: FakeClock) -> None:
    picker = picker_over(A, B, clock=clock)
    picks(picker, 1)

    picker.set_endpoints([A, B, C])

    assert picks(picker, 6) == [B, C, A, B, C, A]


def test_a_removed_endpoint_does_not_change_the_order_of_others(clock: FakeClock) -> None:
    picker = picker_over(A, B, C, D, clock=clock)
    picks(picker, 2)

    picker.set_endpoints([A, C, D])

    assert picks(picker, 4) == [C, D, A, C]


def test_equal_endpoints_in_another_order_change_nothing(clock: FakeClock) -> None:
    picker = picker_over(A, B, C, clock=clock)
    picks(picker, 1)

    picker.set_endpoints([C, B, A])

    assert picks(picker, 3) == [B, C, A]


def test_the_first_endpoint_of_a_family_is_chosen_as_those_of_the_other_family(clock: FakeClock) -> None:
    picker = picker_over(A, clock=clock)
    picker.balance(Balance.SOURCE_HASH, ())
    assert picker.pick("2001:db8::9") is None

    picker.set_endpoints([A, six := Endpoint("2001:db8::1", 80)])

    choice = picker.pick("2001:db8::9")
    assert choice is not None
    assert (choice.endpoint, choice.why) == (six, "source hash")


def test_an_endpoint_has_one_set_of_counters_whatever_it_was_chosen_for(clock: FakeClock) -> None:
    memory = Memory(clock, 10)
    picker, other = Picker(memory), Picker(memory)
    for one in (picker, other):
        one.set_endpoints([A, B, C])
    of = dict(memory.counters())
    chosen = [picker.pick("c"), picker.pick("c"), picker.pick("d", [B.address]), other.pick("g")]
    picker.report_failure(A)
    chosen += [picker.pick("c"), picker.pick("e", [B.address, C.address])]
    picker.set_endpoints([C, A, B])
    chosen += [picker.pick(f"f{n}") for n in range(3)]

    assert {choice.why for choice in chosen if choice} == {
        "round robin", "affinity", "failover", "last resort",
    }  # fmt: skip
    assert all(choice and choice.counters is of[choice.endpoint.address] for choice in chosen)


def test_the_counters_of_an_endpoint_go_with_its_last_connection(clock: FakeClock) -> None:
    memory = Memory(clock)
    picker = Picker(memory)
    picker.set_endpoints([A, B])
    a, b = (counters for _, counters in memory.counters())
    a.opened, a.open = 5, 1
    b.opened = 5

    picker.set_endpoints([C])
    assert {address for address, _ in memory.counters()} == {C.address, A.address}
    picker.set_endpoints([C, A, B])
    assert [dict(memory.counters())[e.address].opened for e in (A, B, C)] == [5, 0, 0]

    picker.set_endpoints([C])
    a.open = 0
    assert [address for address, _ in memory.counters()] == [C.address]


def test_a_pinned_client_keeps_its_endpoint_and_others_are_balanced(clock: FakeClock) -> None:
    picker = picker_over(A, B, C, clock=clock, affinity_timeout_s=10)

    assert picks(picker, 3, "c1") == [A, A, A]
    assert picks(picker, 2, "c2") == [B, B]
    assert picks(picker, 1, "c1") == [A]
    assert picks(picker, 1, "c3") == [C]


def test_a_pin_slides_with_each_connection_and_ends_without(clock: FakeClock) -> None:
    picker = picker_over(A, B, clock=clock, affinity_timeout_s=10_800)
    picks(picker, 1)
    for _ in range(3):
        clock.now_s += 10_799
        assert picks(picker, 1) == [A]

    clock.now_s += 10_800

    assert picks(picker, 1) == [B]


def test_an_endpoint_that_joins_moves_no_pinned_client(clock: FakeClock) -> None:
    picker = picker_over(A, clock=clock, affinity_timeout_s=10)
    picks(picker, 1)

    picker.set_endpoints([A, B, C])

    assert picks(picker, 5) == [A] * 5


def test_a_pinned_client_whose_endpoint_left_is_pinned_to_another(clock: FakeClock) -> None:
    picker = picker_over(A, B, C, clock=clock, affinity_timeout_s=10)
    picks(picker, 1)
    picker.set_endpoints([B, C])
    (moved,) = picks(picker, 1)

    picker.set_endpoints([A, B, C])

    assert moved in (B, C)
    assert picks(picker, 3) == [moved] * 3


def test_a_pinned_client_whose_endpoint_failed_is_pinned_to_another(clock: FakeClock) -> None:
    picker = picker_over(A, B, C, clock=clock, affinity_timeout_s=10)
    picks(picker, 1)
    picker.report_failure(A)

    second = picker.pick("c", tried={A.address: True})

    assert second is not None
    assert second.endpoint == B
    assert picks(picker, 3) == [B] * 3


def test_another_timeout_of_affinity_holds_for_the_pins_that_there_are(clock: FakeClock) -> None:
    memory = Memory(clock, affinity_timeout_s=10_000)
    picker = Picker(memory)
    picker.set_endpoints([A, B])
    assert picks(picker, 1, "c1") == picks(picker, 1, "c1") == [A]
    clock.now_s += 5

    memory.set_affinity(10)
    clock.now_s += 4
    assert picks(picker, 1, "c1") == [A]
    clock.now_s += 11

    assert picks(picker, 1, "c1") == [B]


def test_switching_affinity_off_lets_clients_take_turns(clock: FakeClock) -> None:
    memory = Memory(clock, affinity_timeout_s=10)
    picker = Picker(memory)
    picker.set_endpoints([A, B])
    picks(picker, 2)

    memory.set_affinity(None)

    assert set(picks(picker, 2)) == {A, B}


def test_an_endpoint_that_refused_is_ejected_for_a_time(clock: FakeClock) -> None:
    picker = picker_over(A, B, clock=clock)
    picker.report_failure(A)

    assert picks(picker, 3) == [B, B, B]

    clock.now_s += EJECT_S
    assert A in picks(picker, 2)


def test_of_many_connections_one_has_the_trial(clock: FakeClock) -> None:
    picker = picker_over(A, B, clock=clock)
    picker.report_failure(A)
    clock.now_s += EJECT_S

    assert picks(picker, 6).count(A) == 1

    picker.report_success(A)
    assert picks(picker, 4).count(A) == 2


def test_the_time_doubles_with_each_failed_trial_up_to_a_minute(clock: FakeClock) -> None:
    picker = picker_over(A, B, clock=clock)
    waits = []
    for _ in range(8):
        picker.report_failure(A)
        failed_at = clock.now_s
        while A not in picks(picker, 2):
            clock.now_s += 0.5
        waits.append(clock.now_s - failed_at)

    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]


def test_failures_of_connections_that_were_under_way_together_count_once(clock: FakeClock) -> None:
    picker = picker_over(A, B, clock=clock)
    for _ in range(50):
        picker.report_failure(A)

    clock.now_s += EJECT_S

    assert A in picks(picker, 2)


def test_the_last_endpoint_is_never_ejected(clock: FakeClock) -> None:
    picker = picker_over(A, B, clock=clock)
    picker.report_failure(A)
    picker.report_failure(B)

    assert B in picks(picker, 2)


def test_a_connection_that_failed_everywhere_else_may_try_an_ejected_endpoint(clock: FakeClock) -> None:
    picker = picker_over(A, B, clock=clock)
    picker.report_failure(A)

    choice = picker.pick("c", tried={B.address: True})

    assert choice is not None
    assert (choice.endpoint, choice.why) == (A, "last resort")


def test_a_connection_is_never_sent_twice_to_where_it_failed(clock: FakeClock) -> None:
    picker = picker_over(A, B, clock=clock)

    assert picker.pick("c", tried={A.address: True, B.address: True}) is None


def test_an_endpoint_that_comes_back_to_the_cluster_starts_afresh(clock: FakeClock) -> None:
    picker = picker_over(A, B, clock=clock)
    picker.report_failure(A)
    picker.set_endpoints([B])

    picker.set_endpoints([A, B])

    assert set(picks(picker, 2)) == {A, B}


def test_it_says_why(clock: FakeClock) -> None:
    picker = picker_over(A, B, C, clock=clock, affinity_timeout_s=10)
    first, again = picker.pick("c"), picker.pick("c")
    other = picker.pick("c", tried={A.address: True})

    assert [choice.why for choice in (first, again, other) if choice] == ["round robin", "affinity", "failover"]


# ---- what clients' own dials say


def test_a_client_that_is_refused_ejects_an_endpoint_for_itself_alone(clock: FakeClock) -> None:
    picker = picker_over(A, B, C, clock=clock)
    for endpoint in (A, B):
        assert picker.report_failure(endpoint, as_client="refused")

    assert picks(picker, 3, "refused") == [C, C, C]
    assert set(picks(picker, 3, "other")) == {A, B, C}
    picker.report_failure(C, as_client="refused")
    assert None not in picks(picker, 3, "refused"), "better a doubtful one than none"

    clock.now_s += EJECT_S
    assert "last resort" not in {choice.why for _ in range(2) if (choice := picker.pick("refused"))}
    assert set(picks(picker, 3, "refused")) == {A, B, C}
    picker.report_success(A, as_client="refused")
    picker.report_failure(B, as_client="refused")
    clock.now_s += EJECT_S
    assert set(picks(picker, 2, "refused")) == {A, C}, "the second time lasts for twice as long"


def test_a_slow_start_stays_with_its_endpoint_when_another_leaves(clock: FakeClock) -> None:
    memory = Memory(clock)
    memory.set_slow_start(30)
    picker = Picker(memory)
    picker.set_endpoints([A, B, C, D])
    for recovered in (A, D):
        picker.report_failure(recovered)
        picker.report_success(recovered)
    picks(picker, 1)

    picker.set_endpoints([B, C, D])

    seen = picks(picker, 300)
    assert seen.count(B) > seen.count(C) / 2 > seen.count(D)


def test_after_some_adjacent_failures_an_attempt_goes_on_far_away(clock: FakeClock) -> None:
    """Adjacent endpoints are often of one node, which may be gone."""
    endpoints = [Endpoint(f"10.0.1.{n}", 80) for n in range(100)]
    picker = picker_over(*endpoints, clock=clock)
    tried: list[Address] = []
    for _ in range(4):
        choice = picker.pick("c", tried)
        assert choice is not None
        tried.append(choice.endpoint.address)

    assert max(endpoints.index(Endpoint(*address)) for address in tried) > 10


def test_a_failure_of_an_endpoint_that_has_left_ejects_nothing(clock: FakeClock) -> None:
    picker = picker_over(A, B, clock=clock)
    picker.set_endpoints([B])

    assert not picker.report_failure(A)
    assert not picker.report_failure(A, as_client="c")


def test_a_pinned_client_leaves_an_endpoint_that_refuses_it(clock: FakeClock) -> None:
    picker = picker_over(A, B, clock=clock, affinity_timeout_s=10)
    assert [picks(picker, 1, client)[0] for client in ("c", "d")] == [A, B]

    picker.report_failure(A, as_client="c")

    assert [picks(picker, 1, client)[0] for client in ("c", "d")] == [B, B]


def test_what_clients_failures_make_us_remember_is_bounded(clock: FakeClock) -> None:
    memory = Memory(clock)
    picker = Picker(memory)
    endpoints = [Endpoint(f"10.2.{n // 250}.{n % 250}", 80) for n in range(2 * REFUSALS_OF_A_CLIENT_MAX)]
    picker.set_endpoints(endpoints)
    for endpoint in endpoints:
        picker.report_failure(endpoint, as_client="one")
    assert len(memory.ejected_for["one"]) == REFUSALS_OF_A_CLIENT_MAX
    for number in range(REFUSED_CLIENTS_MAX):
        picker.report_failure(endpoints[0], as_client=f"c{number}")

    assert len(memory.ejected_for) == REFUSED_CLIENTS_MAX
    assert "one" not in memory.ejected_for


def test_an_ejection_by_another_picker_or_process_is_seen_though_many_are_ejected(clock: FakeClock) -> None:
    first, second = pickers_over([A, B, C, D], [A, B, C], clock)
    first.report_failure(A)
    assert set(picks(second, 4)) == {B, C}

    first.report_failure(B)
    assert picks(second, 2) == [C, C]
    second.report_success(A)
    assert set(picks(first, 6)) == {A, C, D}
    clock.now_s += EJECT_S
    assert picks(first, 3).count(B) == 1
    assert B not in picks(second, 3), "its trial is under way"


# ---- both families


A6, B6 = Endpoint("fd00::1", 80), Endpoint("fd00::2", 80)


def test_a_client_meets_endpoints_of_its_own_family_in_turns_of_their_own(clock: FakeClock) -> None:
    picker = picker_over(A, A6, B, B6, clock=clock)

    assert picks(picker, 3, "10.1.0.1") == [A, B, A]
    assert picks(picker, 3, "fd01::1") == [A6, B6, A6]
    assert picks(picker, 1, "10.1.0.1") == [B]


def test_a_family_without_endpoints_has_none_to_pick(clock: FakeClock) -> None:
    picker = picker_over(A, clock=clock, affinity_timeout_s=10)

    assert picks(picker, 2, "fd01::1") == [None, None]


def test_the_last_endpoint_of_a_family_is_never_ejected(clock: FakeClock) -> None:
    picker = picker_over(A, A6, B6, clock=clock)

    assert not picker.report_failure(A)
    assert picker.report_failure(A6)


# ---- several pickers of one service port


def pickers_over(
    first: Sequence[Endpoint], second: Sequence[Endpoint], clock: FakeClock, affinity_timeout_s: int | None = None
) -> tuple[Picker, Picker]:
    memory = Memory(clock, affinity_timeout_s)
    pickers = Picker(memory), Picker(memory)
    for picker, endpoints in zip(pickers, (first, second), strict=True):
        picker.set_endpoints(endpoints)
    return pickers


def test_a_client_is_pinned_once_for_all_pickers_that_have_its_endpoint(clock: FakeClock) -> None:
    cluster, local = pickers_over([A, B, C], [B, C], clock, affinity_timeout_s=10)

    assert picks(local, 1) == [B]
    assert picks(cluster, 2) == [B, B]

    clock.now_s += 9
    picks(cluster, 1)
    clock.now_s += 9
    assert picks(local, 1) == [B], "each connection renews the pin, wherever it comes"


def test_a_client_whose_endpoint_a_picker_has_not_is_pinned_anew_for_all(clock: FakeClock) -> None:
    cluster, local = pickers_over([A, B, C], [B], clock, affinity_timeout_s=10)
    assert picks(cluster, 1) == [A]

    assert picks(local, 1) == [B]

    assert picks(cluster, 2) == [B, B]


def test_an_endpoint_that_refused_one_picker_is_ejected_for_all(clock: FakeClock) -> None:
    cluster, local = pickers_over([A, B, C], [A, B], clock)
    cluster.report_failure(A)

    assert picks(local, 2) == [B, B]

    local.report_success(A)
    assert picks(cluster, 3) == [A, B, C]


def test_only_an_endpoint_that_joins_starts_slowly_whichever_picker_gets_its_endpoints_first(clock: FakeClock) -> None:
    memory = Memory(clock)
    memory.set_slow_start(30)
    local, cluster, empty = Picker(memory), Picker(memory), Picker(memory)
    empty.set_endpoints([])
    local.set_endpoints([A])
    cluster.set_endpoints([A, B])
    assert not memory.starting
    assert picks(cluster, 4) == [A, B, A, B]

    empty.set_endpoints([C])
    cluster.set_endpoints([A, B, C])

    assert list(memory.starting) == [C.address]


def test_an_ejection_stays_while_any_picker_has_the_endpoint(clock: FakeClock) -> None:
    cluster, local = pickers_over([A, B, C], [A, B], clock)
    cluster.report_failure(A)
    local.set_endpoints([B])
    local.set_endpoints([A, B])
    assert picks(local, 2) == [B, B]

    cluster.set_endpoints([B])
    local.set_endpoints([B])
    local.set_endpoints([A, B])

    assert set(picks(local, 2)) == {A, B}


# ---- how much is remembered


def test_at_the_bound_the_least_recently_used_pin_is_dropped(clock: FakeClock) -> None:
    memory = Memory(clock, affinity_timeout_s=10)
    pickers = Picker(memory), Picker(memory)
    for picker in pickers:
        picker.set_endpoints([A, B])
    for number in range(PINS_MAX + 10):
        pickers[number % 2].pick(f"c{number}")
        if number == PINS_MAX - 1:
            pickers[1].pick("c0")  # it is back, by the other listener

    assert len(memory.pins) == PINS_MAX
    assert "c0" in memory.pins
    assert "c1" not in memory.pins


def test_expired_pins_are_removed_without_a_look_up(clock: FakeClock) -> None:
    memory = Memory(clock, affinity_timeout_s=10)
    picker = Picker(memory)
    picker.set_endpoints([A, B])
    for number in range(100):
        picker.pick(f"c{number}")

    clock.now_s += 10
    picker.pick("somebody")

    assert list(memory.pins) == ["somebody"]
