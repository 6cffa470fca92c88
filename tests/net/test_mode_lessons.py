"""Lessons, run as they are written: clients get the results that the lessons describe."""

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
def test_in_a_kernel_mode_clients_fail_until_the_rules_omit_a_dead_backend(mode: str, who: tuple[str, ...]) -> None:
    web, cart, web_then, cart_then, web_told, cart_told = play(f"mode-{mode}", who)

    assert set(web) == PODS
    [victim] = cart
    assert set(web_then) == PODS - {victim} | {"failed"}
    assert cart_then == {"failed": 6}
    assert set(web_told) == PODS - {victim}
    assert len(set(cart_told) & (PODS - {victim})) == len(cart_told) == 1


def asked(lesson: str, folder: Path) -> list[str]:
    """Return the answers to the questions of *lesson*. `dig` is a client of ours: few machines have it."""
    dig = folder / "dig"
    dig.write_text(f"#!{sys.executable}\n{_DIG}")
    dig.chmod(0o755)
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["unshare", *OF_NO_PRIVILEGES, "--pid", "--fork", "--kill-child", str(EXAMPLES / "play.sh"), lesson]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=True, env={**os.environ, "PATH": path}
    )
    return [line for line in done.stdout.partition("\ndig ")[2].splitlines()[1:] if not line.startswith("dig ")]


_DIG = """
import sys, dns.message, dns.query, dns.reversename
server, *words = [word for word in sys.argv[1:] if word != "+short"]
reverse = words[0] == "-x"
name = dns.reversename.from_address(words[1]) if reverse else words[0]
kind = "PTR" if reverse else (words[1:] or ["A"])[0]
answer = dns.query.udp(dns.message.make_query(name, kind), server[1:], timeout=5)
for rrset in answer.answer:
    for record in rrset:
        print(record)
"""


@pytest.mark.parametrize(
    ("lesson", "expected"),
    [
        ("dns", ["10.96.0.25", "0 100 80 hello.default.svc.cluster.local.", "hello.default.svc.cluster.local."]),
        (
            "headless",
            [
                *("10.244.0.2", "10.244.0.3", "10.244.0.3"),
                *(f"0 100 5432 db-{index}.db.default.svc.cluster.local." for index in (0, 1)),
            ],
        ),
        ("external-name", ["hello.default.svc.cluster.local.", "10.96.0.25", "mail.example.com."]),
    ],
)
def test_names_are_answered_as_their_lesson_says(lesson: str, expected: list[str], tmp_path: Path) -> None:
    assert asked(lesson, tmp_path) == expected


def test_the_variables_of_the_kubelet_are_printed_as_the_lesson_says() -> None:
    command = ["unshare", *OF_NO_PRIVILEGES, "--pid", "--fork", "--kill-child"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [*command, str(EXAMPLES / "play.sh"), "environment"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env={**os.environ, "PATH": path},
    )

    lines = done.stdout.splitlines()
    assert "REDIS_PRIMARY_PORT_6379_TCP=tcp://10.96.0.26:6379" in lines
    assert lines[-1].startswith("10.96.0.26 redis-primary.default.svc.cluster.local ")


def test_a_forward_follows_a_rollout_as_its_lesson_says() -> None:
    both, one = play("forward", OF_NO_PRIVILEGES, rows_of_dials=2)

    assert both == {f"{ONE}:8080": 5, f"{TWO}:8080": 5}
    assert one == {f"{TWO}:8080": 10}


def test_a_node_starts_offline_as_its_lesson_says() -> None:
    before, offline = play("offline", OF_NO_PRIVILEGES, rows_of_dials=2)

    assert before == offline == {f"{ONE}:8080": 5, f"{TWO}:8080": 5}


def test_balancing_is_as_its_lesson_says() -> None:
    turns, fewest, *hashed = play("balance", OF_NO_PRIVILEGES, rows_of_dials=4)

    assert turns == {f"{ONE}:8080": 5, f"{TWO}:8080": 3, f"{THREE}:8080": 1}
    assert fewest == {f"{TWO}:8080": 3, f"{THREE}:8080": 3}
    assert all(list(of_client.values()) == [6] for of_client in hashed)


def test_probes_notice_that_a_backend_hangs_and_that_it_continues() -> None:
    before, hanging, after = play("health-check", OF_NO_PRIVILEGES, rows_of_dials=3)

    assert before == after == dict.fromkeys(PODS, 3)
    assert hanging.keys() == PODS - {f"{TWO}:8080"}
    assert hanging.total() == 9
