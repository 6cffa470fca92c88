"""The allocator: each number has one key, and stays the same after a restart."""

from __future__ import annotations

import random

import pytest

from userspace_proxy.model.allocation import Allocator


def test_a_key_keeps_its_number_as_long_as_it_holds_it() -> None:
    allocator = Allocator(100)

    assert allocator.allocate("a") == allocator.allocate("a")


def test_each_key_gets_a_number_of_its_own_until_all_are_taken() -> None:
    allocator = Allocator(20)

    numbers = [allocator.allocate(f"key{n}") for n in range(20)]

    assert sorted(number for number in numbers if number is not None) == list(range(20))
    assert allocator.allocate("one too many") is None


def test_without_saved_allocations_a_key_gets_the_same_number_independent_of_others() -> None:
    alone, crowded = Allocator(1 << 16), Allocator(1 << 16)
    for n in range(20):
        crowded.allocate(f"other{n}")

    assert alone.allocate("a") == crowded.allocate("a")


def test_the_numbers_are_the_same_in_every_release() -> None:
    """A changed number would move the addresses of proxies without a state file."""
    allocator = Allocator(65_000)

    assert [allocator.allocate(key) for key in ("default/web/IPv4", "default/dns/IPv4")] == [29_388, 26_632]


def test_saved_allocations_are_restored_in_any_order() -> None:
    before = Allocator(8)
    held = {key: before.allocate(key) for key in "abcdefgh"}

    after = Allocator(8, before.memory())

    assert {key: after.allocate(key) for key in "hgfedcba"} == held


def test_a_reserved_number_is_given_to_another_key_only_if_no_other_is_left() -> None:
    allocator = Allocator(3, {"absent": 1})

    assert {allocator.allocate("a"), allocator.allocate("b")} == {0, 2}
    assert allocator.allocate("c") == 1


def test_a_key_whose_number_was_given_away_gets_another() -> None:
    allocator = Allocator(2, {"late": 0})
    allocator.take("early", 0)

    assert allocator.allocate("late") == 1


def test_a_released_number_is_free_and_reserved_for_its_former_key() -> None:
    allocator = Allocator(50)
    number = allocator.allocate("a")
    assert number is not None

    allocator.release("a")

    assert allocator.holder(number) is None
    assert allocator.allocate("a") == number


def test_a_taken_number_is_refused_to_others_and_granted_again_to_its_holder() -> None:
    allocator = Allocator(10)
    assert allocator.take("a", 3)

    assert not allocator.take("b", 3)
    assert allocator.take("a", 3)
    assert allocator.holder(3) == "a"


def test_taking_another_number_frees_the_one_before() -> None:
    allocator = Allocator(10)
    allocator.take("a", 3)

    allocator.take("a", 4)

    assert allocator.holder(3) is None
    assert allocator.memory() == {"a": 4}


def test_remembered_numbers_outside_of_a_smaller_range_are_forgotten() -> None:
    allocator = Allocator(4, {"a": 4, "b": -1, "c": 3})

    assert allocator.allocate("c") == 3
    assert allocator.allocate("a") in range(3)


def test_two_keys_with_the_same_remembered_number_get_different_ones() -> None:
    allocator = Allocator(4, {"a": 2, "b": 2})

    assert allocator.allocate("a") == 2
    assert allocator.allocate("b") in (0, 1, 3)


def test_the_count_of_changes_follows_saved_values_only() -> None:
    allocator = Allocator(4)
    allocator.allocate("a")
    after_one = allocator.changes

    allocator.allocate("a")
    allocator.release("nobody")

    assert after_one == 1
    assert allocator.changes == 1


def test_an_empty_range_allocates_nothing() -> None:
    with pytest.raises(ValueError, match="nothing to allocate"):
        Allocator(0)


def test_reservations_of_released_keys_are_bounded() -> None:
    allocator = Allocator(8)
    for n in range(1_000):
        allocator.allocate(f"key{n}")
        allocator.release(f"key{n}")

    assert len(allocator._remembered) <= 2 * 8 + 1


@pytest.mark.parametrize("seed", range(5))
def test_no_number_has_two_keys_and_a_restart_changes_none(seed: int) -> None:
    chance = random.Random(seed)
    allocator = Allocator(30)
    for _ in range(400):
        key = f"key{chance.randrange(40)}"
        match chance.randrange(3):
            case 0:
                allocator.allocate(key)
            case 1:
                allocator.take(key, chance.randrange(30))
            case _:
                allocator.release(key)

    memory = allocator.memory()
    assert len(set(memory.values())) == len(memory)
    assert all(allocator.holder(number) == key for key, number in memory.items())
    again = Allocator(30, memory)
    assert {key: again.allocate(key) for key in sorted(memory)} == memory
