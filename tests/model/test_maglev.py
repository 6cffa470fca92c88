"""Maglev's table: shares of slots, weights, and how few slots change when endpoints come and go."""

from __future__ import annotations

from collections import Counter

import pytest

from userspace_proxy.model.endpoint import Address
from userspace_proxy.model.maglev import slot_table


def addresses(count: int) -> list[Address]:
    return [(f"10.244.{n // 250}.{n % 250 + 1}", 8080) for n in range(count)]


@pytest.mark.parametrize(
    ("count", "slots"), [(1, 16), (2, 16), (8, 16), (9, 256), (128, 256), (129, 4_096), (4_095, 4_096)]
)
def test_every_endpoint_has_its_share_of_slots(count: int, slots: int) -> None:
    shares = Counter(slot_table(addresses(count), slots))

    assert len(shares) == count
    assert max(shares.values()) - min(shares.values()) <= 1


def test_endpoints_have_slots_by_their_weights() -> None:
    three, one, none = addresses(3)

    assert Counter(slot_table([three, one, none], 256, {three[0]: 3, none[0]: 0})) == {three: 192, one: 64}
    assert len(Counter(slot_table([three, one], 16, {three[0]: 0, one[0]: 0}))) == 2


@pytest.mark.parametrize(("count", "weight"), [(50, 100), (100, 50), (60, 80)])
def test_endpoints_that_ask_for_more_slots_than_there_are_have_their_share(count: int, weight: int) -> None:
    shares = Counter(slot_table(addresses(count), 4_096, {ip: weight for ip, _ in addresses(count)}))

    assert len(shares) == count
    assert max(shares.values()) - min(shares.values()) <= 1


def test_many_light_endpoints_have_slots_beside_heavy_ones() -> None:
    weights = {ip: 100 for ip, _ in addresses(95)}

    assert len(Counter(slot_table(addresses(4_095), 4_096, weights))) == 4_095


@pytest.mark.parametrize(("count", "slots"), [(2, 16), (8, 16), (100, 256), (1_000, 4_096)])
def test_when_an_endpoint_goes_few_slots_of_the_others_change(count: int, slots: int) -> None:
    before = addresses(count)
    gone = before[count // 2]
    after = [endpoint for endpoint in before if endpoint != gone]

    pairs = zip(slot_table(before, slots), slot_table(after, slots), strict=True)

    assert sum(was not in (gone, now) for was, now in pairs) <= slots // 4
