"""Properties of every balancing algorithm: fairness, weights, little disruption, affinity, ejection, slow start."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import FakeClock
from userspace_proxy.dataplane.balancing import ALGORITHMS
from userspace_proxy.dataplane.memory import EJECT_S, Memory
from userspace_proxy.dataplane.picker import Pick, Picker
from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.service import Balance, Weights

ENDPOINTS = tuple(Endpoint(f"10.0.0.{n}", 80) for n in range(1, 11))
A, B, C, D, *_ = ENDPOINTS
every_algorithm = pytest.mark.parametrize("balance", Balance)
FAIR = tuple(Balance)  # those that give each endpoint its share
every_fair_algorithm = pytest.mark.parametrize("balance", FAIR)


def picker_over(
    *endpoints: Endpoint,
    balance: Balance,
    weights: Sequence[int] = (),
    clock: FakeClock | None = None,
    affinity_timeout_s: int | None = None,
) -> Picker:
    picker = Picker(Memory(clock or FakeClock(), affinity_timeout_s))
    picker.balance(balance, weights_of(endpoints, weights))
    picker.set_endpoints(endpoints)
    return picker


def weights_of(endpoints: Sequence[Endpoint], weights: Sequence[int]) -> Weights:
    return tuple((endpoint.ip, weight) for endpoint, weight in zip(endpoints, weights, strict=False))


def clients() -> Iterator[str]:
    return (f"10.1.{n >> 8}.{n & 255}" for n in range(1 << 16))


def connect(picker: Picker, count: int) -> list[Pick]:
    """Return the choices for *count* clients, whose connections all stay open."""
    found = []
    for client, _ in zip(clients(), range(count), strict=False):
        pick = picker.pick(client)
        assert pick is not None
        pick.counters.opened += 1
        pick.counters.open += 1
        found.append(pick)
    return found


def shares(picks: Sequence[Pick]) -> Counter[Endpoint]:
    return Counter(pick.endpoint for pick in picks)


def test_every_word_of_the_annotation_has_its_algorithm() -> None:
    assert set(ALGORITHMS) == set(Balance)
    assert [ALGORITHMS[word]().why for word in Balance] == [word.replace("-", " ") for word in Balance]


@every_fair_algorithm
@settings(max_examples=30, deadline=None)
@given(weights=st.lists(st.integers(0, 9), min_size=1, max_size=10))
def test_connections_are_in_proportion_to_the_weights(balance: Balance, weights: list[int]) -> None:
    count = 600
    endpoints = ENDPOINTS[: len(weights)]
    seen = shares(connect(picker_over(*endpoints, balance=balance, weights=weights), count))

    weights = weights if any(weights) else [1] * len(weights)
    for endpoint, weight in zip(endpoints, weights, strict=True):
        part = weight / sum(weights)
        # Six standard deviations of a random choice; the table of source hash has slots by whole numbers besides.
        slack = 6 * math.sqrt(count * part * (1 - part)) + 4
        if balance in (Balance.ROUND_ROBIN, Balance.LEAST_CONNECTIONS):
            slack = max(weights)
        assert abs(seen[endpoint] - count * part) <= (slack if weight else 0)


@settings(max_examples=40, deadline=None)
@given(weights=st.lists(st.integers(1, 9), min_size=1, max_size=6), start=st.integers(0, 30))
def test_round_robin_is_exact_over_each_cycle_wherever_it_begins(weights: list[int], start: int) -> None:
    endpoints = ENDPOINTS[: len(weights)]
    picker = picker_over(*endpoints, balance=Balance.ROUND_ROBIN, weights=weights)
    connect(picker, start)

    cycle = shares(connect(picker, sum(weights)))

    assert [cycle[endpoint] for endpoint in endpoints] == weights


def test_weights_of_5_3_and_1_are_exact_over_each_nine_and_smooth() -> None:
    picks = connect(picker_over(A, B, C, balance=Balance.ROUND_ROBIN, weights=[5, 3, 1]), 40)

    for start in range(31):
        assert shares(picks[start : start + 9]) == {A: 5, B: 3, C: 1}
    assert not any({pick.endpoint for pick in picks[at : at + 3]} == {A} for at in range(7))


@settings(deadline=None)
@given(
    open_now=st.lists(st.integers(0, 20), min_size=2, max_size=10),
    weights=st.lists(st.integers(1, 9), min_size=10, max_size=10),
    tried=st.sets(st.integers(0, 1)),
)
def test_least_connections_chooses_the_fewest_for_their_weight(
    open_now: list[int], weights: list[int], tried: set[int]
) -> None:
    endpoints = ENDPOINTS[: len(open_now)]
    memory = Memory(FakeClock())
    picker = Picker(memory)
    picker.balance(Balance.LEAST_CONNECTIONS, weights_of(endpoints, weights))
    picker.set_endpoints(endpoints)
    loads = {}
    for index, (endpoint, count) in enumerate(zip(endpoints, open_now, strict=True)):
        counters = memory.counters_of(endpoint.address)
        counters.open, counters.dialling = count // 2, count - count // 2
        if index not in tried:
            loads[endpoint] = count / weights[index]

    pick = picker.pick("10.1.0.1", [endpoints[index].address for index in tried])

    if loads:
        assert pick is not None
        assert loads[pick.endpoint] == min(loads.values())
    else:
        assert pick is None


def test_least_connections_among_very_many_endpoints_leaves_the_busiest_alone() -> None:
    memory = Memory(FakeClock())
    picker = Picker(memory)
    picker.balance(Balance.LEAST_CONNECTIONS, ())
    endpoints = [Endpoint(f"10.2.{n >> 8}.{n & 255}", 80) for n in range(1_000)]
    picker.set_endpoints(endpoints)
    memory.counters_of(endpoints[0].address).open = 10

    picks = connect(picker, 1_000)

    assert endpoints[0] not in shares(picks)
    assert max(shares(picks).values()) <= 3


@settings(max_examples=10, deadline=None)
@given(gone=st.integers(0, 9), order=st.permutations(ENDPOINTS))
def test_source_hash_moves_few_other_clients_when_an_endpoint_goes_or_comes(gone: int, order: list[Endpoint]) -> None:
    picker = picker_over(*order, balance=Balance.SOURCE_HASH)
    before = [pick.endpoint for pick in connect(picker, 1_000)]
    assert before == [pick.endpoint for pick in connect(picker_over(*ENDPOINTS, balance=Balance.SOURCE_HASH), 1_000)]
    left = ENDPOINTS[gone]

    picker.set_endpoints([endpoint for endpoint in order if endpoint != left])
    after = [pick.endpoint for pick in connect(picker, 1_000)]

    others = [(was, now) for was, now in zip(before, after, strict=True) if was != left]
    assert sum(was != now for was, now in others) <= 0.05 * len(others)

    picker.set_endpoints(order)
    assert [pick.endpoint for pick in connect(picker, 1_000)] == before


def test_source_hash_moves_only_the_clients_of_an_ejected_endpoint_and_spreads_them() -> None:
    picker = picker_over(*ENDPOINTS, balance=Balance.SOURCE_HASH)
    before = [pick.endpoint for pick in connect(picker, 1_000)]

    picker.report_failure(A)
    after = [pick.endpoint for pick in connect(picker, 1_000)]

    assert all(was == now for was, now in zip(before, after, strict=True) if was != A)
    assert {now for was, now in zip(before, after, strict=True) if was == A} == set(ENDPOINTS) - {A}
    picker.report_success(A)
    assert [pick.endpoint for pick in connect(picker, 1_000)] == before


ACTIONS = st.one_of(
    st.tuples(st.just("endpoints"), st.lists(st.sampled_from(ENDPOINTS), unique=True)),
    st.tuples(st.just("weights"), st.lists(st.integers(0, 3), max_size=10)),
    st.tuples(st.just("balance"), st.sampled_from(Balance)),
    st.tuples(st.sampled_from(("fail", "succeed")), st.sampled_from(ENDPOINTS)),
    st.tuples(st.just("wait"), st.sampled_from((0.1, 1.0, 5.0))),
    st.tuples(st.just("pick"), st.sets(st.sampled_from(ENDPOINTS))),
)


@every_algorithm
@settings(max_examples=60, deadline=None)
@given(slow_start_s=st.sampled_from((0.0, 3.0)), history=st.lists(ACTIONS, max_size=30))
def test_through_any_history_a_choice_is_allowed_and_made_if_one_is_left(
    balance: Balance, slow_start_s: float, history: list[tuple[str, object]]
) -> None:
    clock = FakeClock()
    memory = Memory(clock)
    memory.set_slow_start(slow_start_s)
    picker = Picker(memory)
    endpoints: list[Endpoint] = []
    weights: Weights = ()
    for action, given_to in [*history, ("pick", set())]:
        match action, given_to:
            case "endpoints", list(endpoints):
                picker.set_endpoints(endpoints)
            case "weights", list(numbers):
                weights = weights_of(ENDPOINTS, numbers)
            case "balance", Balance() as balance:
                pass
            case "fail", Endpoint() as endpoint:
                picker.report_failure(endpoint)
            case "succeed", Endpoint() as endpoint:
                picker.report_success(endpoint)
            case "wait", float(seconds):
                clock.now_s += seconds
            case "pick", set(tried):
                takes = {e for e in endpoints if dict(weights).get(e.ip, 1)} or set(endpoints)
                left = takes - tried
                ejected = {e for e in left if e.address in memory.ejected}
                pick = picker.pick("10.1.0.1", [endpoint.address for endpoint in tried])
                assert (pick is None) == (not left)
                if pick is not None:
                    assert pick.endpoint in left
                    assert pick.endpoint not in ejected or pick.why == "trial" or left == ejected
        picker.balance(balance, weights)


@every_algorithm
def test_affinity_takes_precedence_and_outlives_a_change_of_the_algorithm(balance: Balance) -> None:
    picker = picker_over(A, B, C, balance=Balance.ROUND_ROBIN, affinity_timeout_s=10)
    first = {pick.endpoint for pick in connect(picker, 3)}
    assert first == {A, B, C}

    picker.balance(balance, weights_of((A, B, C), [0, 1, 1]))

    picks = connect(picker, 3)
    assert [pick.endpoint for pick in picks] == [A, B, C]
    assert {pick.why for pick in picks} == {"affinity"}
    assert A not in shares(connect(picker, 40)[3:]), "the weight 0 counts for new clients"


@every_algorithm
def test_an_ejected_endpoint_gets_its_trial_and_comes_back(balance: Balance) -> None:
    clock = FakeClock()
    picker = picker_over(A, B, C, balance=balance, clock=clock)
    picker.report_failure(A)
    assert A not in shares(connect(picker, 60))

    clock.now_s += EJECT_S
    trials = [pick for pick in connect(picker, 60) if pick.endpoint == A]
    assert [pick.why for pick in trials] == ["trial"]

    picker.report_success(A)
    again = picker_over(A, B, C, balance=balance)
    connect(again, 60)
    # Of 600 random choices, half the usual share is seven standard deviations away.
    assert shares(connect(picker, 600))[A] >= 0.5 * shares(connect(again, 600))[A] > 0


@every_algorithm
def test_a_connection_goes_from_one_endpoint_to_the_next_until_all_have_failed(balance: Balance) -> None:
    picker = picker_over(A, B, C, balance=balance, weights=[3, 2, 1])
    tried: list[Endpoint] = []
    while (pick := picker.pick("10.1.0.1", [endpoint.address for endpoint in tried])) is not None:
        assert pick.why == ("failover" if tried else ALGORITHMS[balance]().why)
        tried.append(pick.endpoint)

    assert sorted(tried, key=str) == [A, B, C]


# ---- slow start


def starting(balance: Balance, clock: FakeClock) -> tuple[Picker, Memory]:
    memory = Memory(clock)
    memory.set_slow_start(30)
    picker = Picker(memory)
    picker.balance(balance, ())
    picker.set_endpoints([A, B, C])
    assert not memory.starting, "the first endpoints have their whole share at once"
    return picker, memory


def share_of_d(picker: Picker, memory: Memory, count: int = 1_200) -> float:
    """Return the share of its usual connections that D gets; none of them stays open."""
    picks = [picker.pick(client) for client, _ in zip(clients(), range(count), strict=False)]
    return sum(pick is not None and pick.endpoint == D for pick in picks) / (count / 4)


@every_fair_algorithm
@pytest.mark.parametrize("is_new", [True, False], ids=["new", "recovered"])
def test_the_share_of_a_new_or_recovered_endpoint_grows(balance: Balance, is_new: bool) -> None:
    clock = FakeClock()
    picker, memory = starting(balance, clock)
    picker.set_endpoints([A, B, C, D])
    if not is_new:
        clock.now_s += 30
        picker.report_failure(D)
        picker.report_success(D)

    seen = [share_of_d(picker, memory)]
    for _ in range(2):
        clock.now_s += 15
        seen.append(share_of_d(picker, memory))

    assert [abs(share - wanted) < 0.3 for share, wanted in zip(seen, (0.1, 0.5, 1.0), strict=True)] == [True] * 3
    assert seen[0] < seen[1] < seen[2]
    assert not memory.starting


def test_with_least_connections_an_endpoint_in_slow_start_has_fewer_connections_open() -> None:
    clock = FakeClock()
    picker, _ = starting(Balance.LEAST_CONNECTIONS, clock)
    connect(picker, 300)
    picker.set_endpoints([A, B, C, D])
    clock.now_s += 15

    seen = shares(connect(picker, 400))

    assert 0.4 <= seen[D] / (300 / 3 + seen[A]) <= 0.6


def test_where_every_endpoint_is_in_slow_start_all_have_their_turns() -> None:
    picker, memory = starting(Balance.ROUND_ROBIN, FakeClock())
    picker.set_endpoints([A, D])
    picker.set_endpoints([D, B, C])

    assert len(memory.starting) == 3
    assert set(shares(connect(picker, 30)).values()) == {10}


def test_slow_starts_end_when_the_annotation_goes() -> None:
    picker, memory = starting(Balance.ROUND_ROBIN, FakeClock())
    picker.set_endpoints([A, B, C, D])
    assert memory.starting

    memory.set_slow_start(0)

    assert share_of_d(picker, memory, 40) == 1
