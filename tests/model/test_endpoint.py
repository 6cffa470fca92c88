"""Endpoints: their text form, and which of two with one address counts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from userspace_proxy.model.endpoint import Endpoint, difference, join_address, without_duplicates

A = Endpoint("10.0.0.1", 80)
B = Endpoint("10.0.0.2", 80)


@pytest.mark.parametrize(("ip", "shown"), [("10.0.0.1", "10.0.0.1:80"), ("fd00::1", "[fd00::1]:80")])
def test_an_address_is_shown_as_it_would_be_dialled(ip: str, shown: str) -> None:
    assert str(Endpoint(ip, 80)) == join_address(ip, 80) == shown


def test_each_address_counts_once_in_the_order_given() -> None:
    assert without_duplicates([B, A, B, A]) == (B, A)


def test_one_address_with_two_ports_is_two_endpoints() -> None:
    other_port = replace(A, port=81)

    assert without_duplicates([A, other_port]) == (A, other_port)


@pytest.mark.parametrize("terminating_first", [True, False])
def test_of_two_with_one_address_the_one_that_stays_counts(terminating_first: bool) -> None:
    """S9: a pod's address was used again while the old pod still ends."""
    leaving = replace(A, ready=False, terminating=True)
    given = [leaving, A] if terminating_first else [A, leaving]

    assert without_duplicates(given) == (A,)


def test_no_endpoints_are_without_duplicates() -> None:
    assert without_duplicates([]) == ()


def test_a_change_of_endpoints_is_described_in_one_line() -> None:
    unready, leaving = replace(A, ready=False), replace(B, ready=False, terminating=True)

    assert difference((), (A, B)) == "2 endpoints, 2 ready; added 10.0.0.1:80, 10.0.0.2:80"
    assert difference((A, B), (A,)) == "1 endpoint, 1 ready; removed 10.0.0.2:80"
    assert difference((A,), (unready,)) == "1 endpoint, 0 ready; not ready 10.0.0.1:80"
    assert difference((unready,), (A,)) == "1 endpoint, 1 ready; ready 10.0.0.1:80"
    assert difference((B,), (leaving,)) == "1 endpoint, 0 ready; not ready 10.0.0.2:80; terminating 10.0.0.2:80"
    many = [Endpoint(f"10.0.1.{n}", 80) for n in range(9)]
    assert difference((), many).endswith("10.0.1.3:80, 10.0.1.4:80 and 4 more")
