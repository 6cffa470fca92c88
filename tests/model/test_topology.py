"""Which endpoints may take traffic (behaviours C1 to C4, U1)."""

from __future__ import annotations

from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.topology import serving_endpoints, usable_endpoints

READY = Endpoint("10.0.0.1", 80)
LEAVING = Endpoint("10.0.0.2", 80, ready=False, serving=True, terminating=True)
STARTING = Endpoint("10.0.0.3", 80, ready=False, serving=False)
UNREADY_SERVING = Endpoint("10.0.0.4", 80, ready=False, serving=True)
GONE = Endpoint("10.0.0.5", 80, ready=False, serving=False, terminating=True)
PUBLISHED = Endpoint("10.0.0.6", 80, ready=True, serving=False, terminating=True)


def test_while_one_is_ready_only_ready_ones_take_traffic() -> None:
    assert usable_endpoints([LEAVING, READY, STARTING, UNREADY_SERVING, GONE]) == (READY,)


def test_when_none_is_ready_those_that_still_serve_while_they_end_take_it() -> None:
    assert usable_endpoints([LEAVING, STARTING, UNREADY_SERVING, GONE]) == (LEAVING,)


def test_one_that_neither_is_ready_nor_ends_never_takes_traffic() -> None:
    """C4."""
    assert usable_endpoints([STARTING, UNREADY_SERVING, GONE]) == ()


def test_ready_counts_whatever_else_is_said() -> None:
    assert usable_endpoints([PUBLISHED, LEAVING]) == (PUBLISHED,)


def test_flows_may_stay_wherever_something_still_answers() -> None:
    """U1: whatever `ready` and `terminating` say."""
    assert serving_endpoints([READY, LEAVING, STARTING, UNREADY_SERVING, GONE]) == (READY, LEAVING, UNREADY_SERVING)


def test_an_iterator_is_read_once_and_still_falls_back() -> None:
    assert usable_endpoints(iter([LEAVING, STARTING])) == (LEAVING,)
