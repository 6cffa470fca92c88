"""`Picker.preview` returns the endpoint of the next connection, and changes no state."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.dataplane.balancing.test_balancing import ENDPOINTS, every_algorithm, picker_over
from tests.fakes import FakeClock
from userspace_proxy.dataplane.memory import EJECT_S, TRIAL_S
from userspace_proxy.model.service import Balance


@every_algorithm
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_next_connection_gets_one_of_the_endpoints_that_were_foretold(
    balance: Balance, data: st.DataObject
) -> None:
    clock = FakeClock()
    weights = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=8))
    affinity = data.draw(st.sampled_from([None, 60]))
    picker = picker_over(
        *ENDPOINTS[: len(weights)], balance=balance, weights=weights, clock=clock, affinity_timeout_s=affinity
    )
    for _ in range(data.draw(st.integers(1, 30))):
        client = f"10.1.0.{data.draw(st.integers(1, 3))}"
        match data.draw(st.sampled_from(["connect", "connect", "fail", "wait"])):
            case "wait":
                clock.now_s += EJECT_S
            case "fail":
                picker.report_failure(data.draw(st.sampled_from(ENDPOINTS[: len(weights)])), why="refused")
            case _:
                foretold = picker.preview(client)
                assert picker.preview(client) == foretold
                assert math.isclose(sum(odds for _, odds in foretold), 1.0)
                pick = picker.pick(client)
                assert pick is not None
                assert (pick.endpoint, pick.why) in [(each.endpoint, each.why) for each, odds in foretold if odds > 0]
                pick.counters.open += data.draw(st.integers(0, 1))


def test_an_endpoint_whose_trials_were_cut_gets_another_one() -> None:
    clock = FakeClock()
    picker = picker_over(*ENDPOINTS[:3], balance=Balance.ROUND_ROBIN, clock=clock, affinity_timeout_s=60)
    pinned = picker.pick("10.1.0.1")
    assert pinned is not None
    picker.report_failure(pinned.endpoint, why="refused")
    for why in ("trial", "affinity"):  # neither connection ends with a success or a failure
        clock.now_s += EJECT_S + TRIAL_S
        picker.pin("10.1.0.1", pinned.endpoint)
        pick = picker.pick("10.1.0.2" if why == "trial" else "10.1.0.1")
        assert pick is not None
        assert (pick.endpoint, pick.why) == (pinned.endpoint, why)
    clock.now_s += TRIAL_S

    pick = picker.pick("10.1.0.3")

    assert pick is not None
    assert (pick.endpoint, pick.why) == (pinned.endpoint, "trial")


@pytest.mark.parametrize("balance", [Balance.ROUND_ROBIN, Balance.LEAST_CONNECTIONS, Balance.SOURCE_HASH])
def test_a_deterministic_algorithm_foretells_one_endpoint(balance: Balance) -> None:
    picker = picker_over(*ENDPOINTS, balance=balance, weights=[3, 1, 2])
    for number in range(100):
        ((foretold, odds),) = picker.preview(client := f"10.1.0.{number % 7}")
        pick = picker.pick(client)
        assert odds == 1.0
        assert pick is not None
        assert pick.endpoint == foretold.endpoint


def test_random_foretells_the_weights() -> None:
    picker = picker_over(*ENDPOINTS[:3], balance=Balance.RANDOM, weights=[5, 3, 2])

    foretold = {pick.endpoint: odds for pick, odds in picker.preview("10.1.0.1")}

    assert foretold == dict(zip(ENDPOINTS, (0.5, 0.3, 0.2), strict=False))
    seen = Counter(pick.endpoint for _ in range(2_000) if (pick := picker.pick("10.1.0.1")))
    assert all(abs(seen[endpoint] / 2_000 - odds) < 0.08 for endpoint, odds in foretold.items())
