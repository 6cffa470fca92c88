"""Lessons for the lab, played in one lab as they are written: clients see what the lessons say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
LESSONS = sorted(
    readme.parent.name
    for readme in EXAMPLES.glob("*/README.md")
    if re.search("^userspace-proxy lab examples/", readme.read_text(), re.MULTILINE)
)


def play(*lessons: str) -> dict[str, str]:
    """Return what each of *lessons* printed, played one after the other in one lab."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [str(EXAMPLES / "play.sh"), *lessons],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
        env={**os.environ, "PATH": path},
    )
    assert done.returncode == 0, done.stdout
    return dict(zip(lessons, re.split("^apply -f examples/.*$", done.stdout, flags=re.MULTILINE)[1:], strict=True))


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    return play(*LESSONS)


def counts(said: str) -> list[dict[str, int]]:
    """Return the tables of `sort | uniq -c` in *said*, with the pods numbered by their order."""
    tables = re.findall(r"(?:^ +\d+ \S+\n)+", said, re.MULTILINE)
    return [{name: int(count) for count, name in re.findall(r"(\d+) (\S+)", table)} for table in tables]


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_lesson_ends_where_it_began(said: dict[str, str], lesson: str) -> None:
    assert said[lesson].rstrip().endswith("No Pods found in namespace default.")
    assert "command not found" not in said[lesson]
    assert "usage:" not in said[lesson]


def test_a_deployment_has_three_pods_that_take_turns(said: dict[str, str]) -> None:
    answers = re.findall(r"^hostnames-(\S+) 10\.244\.1\.\d+:9376 client", said["deployment"], re.MULTILINE)

    assert len(answers) == 6
    assert answers[:3] == answers[3:]
    assert re.search(r"10\.96\.0\.51 +hostnames\.default\.svc", said["deployment"])


def test_scaling_changes_who_answers_and_no_pod_means_refusal(said: dict[str, str]) -> None:
    assert [sorted(table.values()) for table in counts(said["scaling"])] == [[6, 6], [3, 3, 3, 3], [12], [6, 6]]
    assert "curl: (7)" in said["scaling"]


def test_a_rolling_update_loses_no_request(said: dict[str, str]) -> None:
    assert re.search(r"^grep -c failed answers\n0$", said["rolling-update"], re.MULTILINE)
    assert re.search(r"wc -l\n6$", said["rolling-update"], re.MULTILINE)


def test_a_node_port_shows_the_node_and_with_the_policy_local_the_client(said: dict[str, str]) -> None:
    *masqueraded, local = re.findall(r"client=(\S+)", said["node-port"])

    assert masqueraded == ["10.244.0.1"] * 3
    assert local == "192.168.50.2"


def test_a_load_balancer_has_three_ways_to_its_pods(said: dict[str, str]) -> None:
    assert len(re.findall(r"^balanced-\S+ 10\.244", said["load-balancer"], re.MULTILINE)) == 4
    assert re.search(r"LoadBalancer +10\.96\.0\.56 +203\.0\.113\.\d+ +80:30056/TCP", said["load-balancer"])


def test_a_dead_pod_is_seen_by_clients_in_kernel_modes_alone(said: dict[str, str]) -> None:
    userspace, iptables, nftables, told = counts(said["dead-pod"])

    assert "failed" not in userspace
    assert len(userspace) == 2
    assert iptables["failed"]
    assert nftables["failed"]
    assert "failed" not in told
