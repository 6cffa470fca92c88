"""Lessons, played in the lab as they are written: clients see what the lessons say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
LESSONS = {
    readme.parent.name
    for readme in EXAMPLES.glob("*/README.md")
    if re.search(r"userspace-proxy lab .*examples/\S+$", readme.read_text(), re.MULTILINE)
}


def play(*lessons: str, timeout_s: float) -> dict[str, str]:
    """Return what each of *lessons* printed, played one after the other in one lab."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with subprocess.Popen(
        [str(EXAMPLES / "play.sh"), *lessons],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PATH": path},
    ) as playing:
        try:
            said, _ = playing.communicate(timeout=timeout_s)
        finally:
            playing.terminate()  # it takes the lab with it
    assert playing.returncode == 0, said
    return dict(zip(lessons, re.split("^# ---- .*$", said, flags=re.MULTILINE)[1:], strict=True))


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


def names_lead_to_the_service_and_back(said: str) -> None:
    assert re.search(r"^10\.96\.0\.25\n.*\n0 100 80 hello\.default\.svc\.cluster\.local\.$", said, re.MULTILINE)
    assert re.search(r"^10\.96\.0\.25 +hello\.default", said, re.MULTILINE)
    assert addresses(said) == [ONE]


def a_headless_service_names_its_ready_pods(said: str) -> None:
    assert re.findall(r"^10\.244\.0\.\d$", said, re.MULTILINE) == ["10.244.0.2", "10.244.0.3", "10.244.0.3"]
    assert re.findall(r"^0 100 5432 (db-\d)", said, re.MULTILINE) == ["db-0", "db-1"]
    assert addresses(said) == ["10.244.0.3:5432"]


def an_external_name_is_an_alias(said: str) -> None:
    assert "\nhello.default.svc.cluster.local.\n10.96.0.25\n" in said
    assert "\nmail.example.com.\n" in said
    assert addresses(said) == [ONE]


def a_process_finds_a_service_by_variables(said: str) -> None:
    assert "REDIS_PRIMARY_PORT_6379_TCP=tcp://10.96.0.26:6379" in said
    assert re.search(r"^10\.96\.0\.26 redis-primary\.default\.svc\.cluster\.local ", said, re.MULTILINE)
    assert addresses(said) == [ONE]


def a_forward_follows_a_rollout(said: str) -> None:
    assert [sorted(table.values()) for table in counts(said)] == [[5, 5]]
    assert re.search(r"^grep -c failed answers\n0$", said, re.MULTILINE)
    assert re.search(r"wc -l\n4$", said, re.MULTILINE)


def a_node_starts_without_its_api_server(said: str) -> None:
    assert counts(said) == [{ONE: 5, TWO: 5}] * 2
    assert "the API server has not answered since the start; the state of" in said


def clients_outside_reach_only_pods_of_the_node(said: str) -> None:
    outside, inside = addresses(said)[:4], addresses(said)[4:7]

    assert sorted(outside) == sorted([ONE, TWO] * 2)
    assert set(inside) == {ONE, TWO, THREE}
    assert len(addresses(said)) == 8


def endpoints_of_the_zone_of_the_node_answer(said: str) -> None:
    assert sorted(addresses(said)[:4]) == sorted([ONE, THREE] * 2)
    assert addresses(said)[4:] == [TWO] * 3


def each_algorithm_balances_as_it_says(said: str) -> None:
    turns, fewest, of_client, drawn = counts(said)

    assert turns == {"balanced-1": 5, "balanced-2": 3, "balanced-3": 1}
    assert sorted(fewest.values()) == [3, 3]
    assert list(of_client.values()) == [6]
    assert sum(drawn.values()) == 20
    assert re.findall(r"^\((.*)\)$", said, re.MULTILINE)[-4:] == [
        "least connections", "random", "round robin", "source hash",
    ]  # fmt: skip


def a_probe_notices_that_a_pod_hangs_and_that_it_continues(said: str) -> None:
    before, hanging, after = counts(said)

    assert before == after == dict.fromkeys(("hang-1", "hang-2", "hang-3"), 3)
    assert hanging.keys() == {"hang-1", "hang-3"}
    assert sum(hanging.values()) == 9


def connections_grow_old_lose_their_pod_and_wait(said: str) -> None:
    told = [line for line in said.splitlines() if line in ("the connection has ended", "the connection was reset")]
    assert told == ["the connection has ended", "the connection was reset"]
    assert addresses(said) == [ONE]
    ends = re.findall(rf"-> {re.escape(ONE)} \((.*?)\) .*ms (.*)$", said, re.MULTILINE)
    assert ends == [
        ("round robin", "closed by max-connection-age"),
        ("round robin", "reset by on-endpoint-removal"),
        ("round robin, after a wait", "closed"),
    ]


def no_client_sees_that_a_pinned_backend_died(said: str) -> None:
    web, cart, web_then, cart_then, web_told, cart_told = counts(said)
    [victim] = cart
    pods = {f"userspace-{number}" for number in (1, 2, 3)}

    assert web == dict.fromkeys(pods, 10)
    for told in (web_then, web_told):
        # 15 each, unless the dead one has had a trial meanwhile: its request then goes to the next one, out of turn.
        assert told.keys() == pods - {victim}
        assert sum(told.values()) == 30
        assert max(told.values()) <= 18
    [successor] = cart_then
    assert successor in pods - {victim}
    assert cart_told == {successor: 6}


def clients_fail_until_the_rules_omit_a_dead_backend(mode: str) -> Callable[[str], None]:
    """Return a check of the lesson about a kernel mode."""

    def check(said: str) -> None:
        web, cart, web_then, cart_then, web_told, cart_told = (
            table for table in counts(said) if not has_addresses(table)
        )
        [victim] = cart
        pods = {f"{mode}-{number}" for number in (1, 2, 3)}

        assert set(web) == pods
        assert set(web_then) == pods - {victim} | {"failed"}
        assert cart_then == {"failed": 6}
        assert set(web_told) == pods - {victim}
        assert len(set(cart_told) & (pods - {victim})) == len(cart_told) == 1

    return check


def has_addresses(table: dict[str, int]) -> bool:
    """Return whether *table* counts the slots of addresses, and not answers."""
    return all(name.startswith("10.") for name in table)


def only_iptables_mode_meets_more_rules_with_more_services(said: str) -> None:
    met = [
        (mode, int(count))
        for mode, count in re.findall(r"^(\w+): (\d+) rules did not match, connected", said, re.MULTILINE)
    ]
    few, many = dict(met[:3]), dict(met[3:])

    assert few["iptables"] < 30
    assert many["iptables"] > 1_000
    for mode in ("nftables", "userspace"):
        assert few[mode] == many[mode] < 15


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
    "dns": names_lead_to_the_service_and_back,
    "headless": a_headless_service_names_its_ready_pods,
    "external-name": an_external_name_is_an_alias,
    "environment": a_process_finds_a_service_by_variables,
    "forward": a_forward_follows_a_rollout,
    "offline": a_node_starts_without_its_api_server,
    "traffic-policy": clients_outside_reach_only_pods_of_the_node,
    "topology": endpoints_of_the_zone_of_the_node_answer,
    "balance": each_algorithm_balances_as_it_says,
    "health-check": a_probe_notices_that_a_pod_hangs_and_that_it_continues,
    "connection-policy": connections_grow_old_lose_their_pod_and_wait,
    "mode-userspace": no_client_sees_that_a_pinned_backend_died,
    "mode-iptables": clients_fail_until_the_rules_omit_a_dead_backend("iptables"),
    "mode-nftables": clients_fail_until_the_rules_omit_a_dead_backend("nftables"),
    "mode-ipvs": clients_fail_until_the_rules_omit_a_dead_backend("ipvs"),
    "many-services": only_iptables_mode_meets_more_rules_with_more_services,
}
ROWS = [
    ["mode-userspace", "mode-iptables", "mode-nftables", "dead-pod"],
    ["rolling-update", "forward", "scaling", "failover", "offline", "load-balancer", "balance", "headless", "dns"],
    ["many-services"],
]


def test_each_lesson_has_a_check_here() -> None:
    assert set(CHECKS) == LESSONS


# Several labs at once, as a lesson waits more than it works.
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "lessons",
    [
        *ROWS,
        [one for one in CHECKS if one not in {"mode-ipvs", *(one for row in ROWS for one in row)}],
        pytest.param(["mode-ipvs"], marks=[pytest.mark.ipvs, pytest.mark.timeout(600)]),
    ],
    ids=lambda lessons: f"{lessons[0]} and others",
)
def test_lessons_played_in_one_lab_end_where_they_began_and_clients_see_what_they_say(lessons: Sequence[str]) -> None:
    for lesson, said in play(*lessons, timeout_s=220 if "mode-ipvs" not in lessons else 540).items():
        assert said.rstrip().endswith("No Pods found in namespace default."), said
        assert "command not found" not in said
        assert "usage:" not in said
        sys.stdout.write(said)  # pytest shows it if the check fails
        CHECKS[lesson](said)
