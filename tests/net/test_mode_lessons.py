"""Lessons, played as they are written: what becomes of clients is what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.examples.test_examples import EXAMPLES, ONE, THREE, TWO

PODS = {f"{ip}:8080" for ip in (ONE, TWO, THREE)}
OF_NO_PRIVILEGES = ("--user", "--map-root-user")
# IPVS obeys the root of the machine alone; its machine is an emulated one.
ROOT = ()


def play(lesson: str, who: tuple[str, ...], rows_of_dials: int = 6) -> list[Counter[str]]:
    """Return how often each answer came to each of the lesson's rows of dials."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["unshare", *who, "--pid", "--fork", "--kill-child", str(EXAMPLES / "play.sh"), lesson]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=True, env={**os.environ, "PATH": path}
    )
    rows: list[Counter[str]] = []
    for line in done.stdout.splitlines():
        if re.match(r"for i in .*curl", line):
            rows.append(Counter())
        elif found := re.fullmatch(r" +(\d+) (10\.244\.0\.\d:8080|failed)", line):
            rows[-1][found[2]] += int(found[1])
    assert len(rows) == rows_of_dials, done.stdout
    return rows


def test_in_userspace_mode_no_client_sees_that_a_backend_died() -> None:
    web, cart, web_then, cart_then, web_told, cart_told = play("mode-userspace", OF_NO_PRIVILEGES)

    assert web == dict.fromkeys(PODS, 10)
    [victim] = cart
    for told in (web_then, web_told):
        # 15 each, unless the dead one has had a trial meanwhile: its request then goes to the next one, out of turn.
        assert told.keys() == PODS - {victim}
        assert told.total() == 30
        assert max(told.values()) <= 18
    [successor] = cart_then
    assert successor in PODS - {victim}
    assert cart_told == {successor: 6}


@pytest.mark.parametrize(
    ("mode", "who"),
    [
        ("iptables", OF_NO_PRIVILEGES),
        ("nftables", OF_NO_PRIVILEGES),
        pytest.param("ipvs", ROOT, marks=[pytest.mark.ipvs, pytest.mark.timeout(360)]),
    ],
)
def test_in_a_kernel_mode_clients_fail_until_the_rules_are_told_that_a_backend_died(
    mode: str, who: tuple[str, ...]
) -> None:
    web, cart, web_then, cart_then, web_told, cart_told = play(f"mode-{mode}", who)

    assert set(web) == PODS
    [victim] = cart
    assert set(web_then) == PODS - {victim} | {"failed"}
    assert cart_then == {"failed": 6}
    assert set(web_told) == PODS - {victim}
    assert len(set(cart_told) & (PODS - {victim})) == len(cart_told) == 1


def test_balancing_is_as_its_lesson_says() -> None:
    turns, fewest, *hashed = play("balance", OF_NO_PRIVILEGES, rows_of_dials=4)

    assert turns == {f"{ONE}:8080": 5, f"{TWO}:8080": 3, f"{THREE}:8080": 1}
    assert fewest == {f"{TWO}:8080": 3, f"{THREE}:8080": 3}
    assert all(list(of_client.values()) == [6] for of_client in hashed)


def test_probes_notice_a_backend_that_hangs_and_that_it_goes_on() -> None:
    before, hanging, after = play("health-check", OF_NO_PRIVILEGES, rows_of_dials=3)

    assert before == after == dict.fromkeys(PODS, 3)
    assert hanging.keys() == PODS - {f"{TWO}:8080"}
    assert hanging.total() == 9
