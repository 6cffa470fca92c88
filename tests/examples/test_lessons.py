"""Lessons for the lab, played in one lab as they are written: clients see what the lessons say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
LESSONS = {
    readme.parent.name
    for readme in EXAMPLES.glob("*/README.md")
    if re.search("^userspace-proxy lab examples/", readme.read_text(), re.MULTILINE)
}


def play(*lessons: str) -> dict[str, str]:
    """Return what each of *lessons* printed, played one after the other in one lab."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [str(EXAMPLES / "play.sh"), *lessons],
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
        env={**os.environ, "PATH": path},
    )
    assert done.returncode == 0, done.stdout
    return dict(zip(lessons, re.split("^apply -f examples/.*$", done.stdout, flags=re.MULTILINE)[1:], strict=True))


def counts(said: str) -> list[dict[str, int]]:
    """Return the tables of `sort | uniq -c` in *said*, with the pods numbered by their order."""
    tables = re.findall(r"(?:^ +\d+ \S+\n)+", said, re.MULTILINE)
    return [{name: int(count) for count, name in re.findall(r"(\d+) (\S+)", table)} for table in tables]


def a_deployment_has_three_pods_that_take_turns(said: str) -> None:
    answers = re.findall(r"^hostnames-(\S+) 10\.244\.1\.\d+:9376 client", said, re.MULTILINE)

    assert len(answers) == 6
    assert answers[:3] == answers[3:]
    assert re.search(r"10\.96\.0\.51 +hostnames\.default\.svc", said)


def scaling_changes_who_answers_and_no_pod_means_refusal(said: str) -> None:
    assert [sorted(table.values()) for table in counts(said)] == [[6, 6], [3, 3, 3, 3], [12], [6, 6]]
    assert "curl: (7)" in said


def a_rolling_update_loses_no_request(said: str) -> None:
    assert re.search(r"^grep -c failed answers\n0$", said, re.MULTILINE)
    assert re.search(r"wc -l\n6$", said, re.MULTILINE)


def a_node_port_shows_the_node_and_with_the_policy_local_the_client(said: str) -> None:
    *masqueraded, local = re.findall(r"client=(\S+)", said)

    assert masqueraded == ["10.244.0.1"] * 3
    assert local == "192.168.50.2"


def a_load_balancer_has_three_ways_to_its_pods(said: str) -> None:
    assert len(re.findall(r"^balanced-\S+ 10\.244", said, re.MULTILINE)) == 4
    assert re.search(r"LoadBalancer +10\.96\.0\.56 +203\.0\.113\.\d+ +80:30056/TCP", said)


def a_dead_pod_is_seen_by_clients_in_kernel_modes_alone(said: str) -> None:
    userspace, iptables, nftables, told = counts(said)

    assert "failed" not in userspace
    assert len(userspace) == 2
    assert iptables["failed"]
    assert nftables["failed"]
    assert "failed" not in told


def addresses(said: str) -> list[str]:
    """Return the addresses of the pods that answered, in order."""
    return re.findall(r"^\S+ (10\.244\.\d+\.\d+:\d+) client=", said, re.MULTILINE)


ONE, TWO, THREE = (f"10.244.0.{number}:8080" for number in (2, 3, 4))


def a_client_with_affinity_stays_and_moves_once_when_its_pod_dies(said: str) -> None:
    seen = addresses(said)

    assert len(seen) == 9
    assert len(set(seen[:4])) == len(set(seen[5:])) == 1
    assert seen[5] != seen[0]


def no_request_fails_when_a_backend_dies(said: str) -> None:
    seen = addresses(said)

    assert len(seen) == 18
    assert TWO in seen[:9]
    assert TWO not in seen[9:]


def backends_repeat_the_header_with_the_address_of_the_client(said: str) -> None:
    assert re.search(r"PROXY TCP4 192\.168\.50\.2 10\.96\.0\.21 \d+ 80", said)
    assert re.search(r"PROXY TCP4 10\.244\.0\.\d 10\.96\.0\.21 \d+ 80", said)


def answers(*expected: str) -> Callable[[str], None]:
    """Return a check that the pods at these addresses answered; a rotation may begin with any of them."""

    def check(said: str) -> None:
        assert sorted(addresses(said)) == sorted(expected)

    return check


def has_a_rotation_for_each_port(said: str) -> None:
    *tcp, udp = addresses(said)

    assert sorted(tcp) == sorted(f"10.244.0.{pod}:{port}" for pod in (2, 3) for port in (8080, 9090))
    assert udp in ("10.244.0.2:9000", "10.244.0.3:9000")


CHECKS: dict[str, Callable[[str], None]] = {
    "deployment": a_deployment_has_three_pods_that_take_turns,
    "scaling": scaling_changes_who_answers_and_no_pod_means_refusal,
    "rolling-update": a_rolling_update_loses_no_request,
    "node-port": a_node_port_shows_the_node_and_with_the_policy_local_the_client,
    "load-balancer": a_load_balancer_has_three_ways_to_its_pods,
    "dead-pod": a_dead_pod_is_seen_by_clients_in_kernel_modes_alone,
    "cluster-ip": answers(*[ONE, TWO, THREE] * 2),
    "multi-port": has_a_rotation_for_each_port,
    "named-ports": answers(ONE, "10.244.0.3:8081"),
    "no-selector": answers(ONE, TWO, TWO, THREE),
    "affinity": a_client_with_affinity_stays_and_moves_once_when_its_pod_dies,
    "failover": no_request_fails_when_a_backend_dies,
    "source-ip": backends_repeat_the_header_with_the_address_of_the_client,
}


# One test, as each process of the test run would play all of them for a fixture.
@pytest.mark.timeout(240)
def test_all_lessons_played_in_one_lab_end_where_they_began_and_clients_see_what_they_say() -> None:
    assert set(CHECKS) == LESSONS

    for lesson, said in play(*CHECKS).items():
        assert said.rstrip().endswith("No Pods found in namespace default."), said
        assert "command not found" not in said
        assert "usage:" not in said
        CHECKS[lesson](said)
