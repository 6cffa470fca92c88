"""Every lesson is served as it is, and its manifests match its README."""

from __future__ import annotations

import ipaddress
import re
import runpy
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from userspace_proxy.api.events import EventType
from userspace_proxy.config.settings import Settings
from userspace_proxy.control.allocations import ManifestAllocations
from userspace_proxy.control.lint import Finding, LintOptions, lint
from userspace_proxy.control.tracker import Tracker
from userspace_proxy.dataplane.proxy_protocol import header_v1
from userspace_proxy.lab import ServiceLab
from userspace_proxy.model.service import SourceIP, portals
from userspace_proxy.model.state import ProxyState
from userspace_proxy.model.topology import Node, reach
from userspace_proxy.sources.files import FileSource, read_once

EXAMPLES = Path(__file__).parents[2] / "examples"
OPTIONS = LintOptions(Settings().service_ranges)
CLUSTER_IP_RANGE = ipaddress.ip_network("10.96.0.0/16")

ONE, TWO, THREE = (ServiceLab.pod_ip(index) for index in range(3))
WHAT_IS_SERVED: dict[str, dict[str, list[str]]] = {
    "cluster-ip": {"10.96.0.11:80/TCP": [f"{ONE}:8080", f"{TWO}:8080", f"{THREE}:8080"]},
    "multi-port": {
        "10.96.0.12:80/TCP": [f"{ONE}:8080", f"{TWO}:8080"],
        "10.96.0.12:9090/TCP": [f"{ONE}:9090", f"{TWO}:9090"],
        "10.96.0.12:80/UDP": [f"{ONE}:9000", f"{TWO}:9000"],
    },
    "named-ports": {"10.96.0.13:80/TCP": [f"{ONE}:8080", f"{TWO}:8081"]},
    "no-selector": {
        "10.96.0.14:80/TCP": [f"{ONE}:8080", f"{TWO}:8080"],
        "10.96.0.15:80/TCP": [f"{TWO}:8080", f"{THREE}:8080"],
    },
    "affinity": {"10.96.0.16:80/TCP": [f"{ONE}:8080", f"{TWO}:8080", f"{THREE}:8080"]},
    "health-check": {"10.96.0.22:80/TCP": [f"{ONE}:8080", f"{TWO}:8080", f"{THREE}:8080"]},
    "failover": {"10.96.0.17:80/TCP": [f"{ONE}:8080", f"{TWO}:8080", f"{THREE}:8080"]},
    "traffic-policy": {
        "10.96.0.18:80/TCP": [f"{ONE}:8080", f"{TWO}:8080", f"{THREE}:8080"],
        "*:30018/TCP": [f"{ONE}:8080", f"{TWO}:8080", f"{THREE}:8080"],
    },
    "topology": {"10.96.0.19:80/TCP": [f"{ONE}:8080", f"{TWO}:8080", f"{THREE}:8080"]},
    "source-ip": {"10.96.0.21:80/TCP": [f"{ONE}:8082", f"{TWO}:8082"]},
    "balance": {f"10.96.0.{number}:80/TCP": [f"{ONE}:8080", f"{TWO}:8080", f"{THREE}:8080"] for number in (41, 42, 43)},
    # Without the lab a Deployment has no Pods.
    "deployment": {"10.96.0.51:80/TCP": []},
    "scaling": {"10.96.0.52:80/TCP": []},
    "rolling-update": {"10.96.0.53:80/TCP": []},
    "node-port": {
        "10.96.0.54:80/TCP": [],
        "*:30054/TCP": [],
        "10.96.0.55:80/TCP": [],
        "*:30055/TCP": [],
    },
    "load-balancer": {"10.96.0.56:80/TCP": [], "*:30056/TCP": []},
    "dead-pod": {"10.96.0.57:80/TCP": []},
    "dns": {"10.96.0.25:80/TCP": [f"{ONE}:8080"]},
    "headless": {},
    "environment": {"10.96.0.26:6379/TCP": [f"{ONE}:8080"]},
    "offline": {"10.96.0.28:80/TCP": [f"{ONE}:8080", f"{TWO}:8080"]},
    "forward": {"10.96.0.27:80/TCP": []},
    "many-services": {"10.96.0.60:80/TCP": []},
    "external-name": {},
    "connection-policy": {"10.96.0.24:80/TCP": [f"{ONE}:8080"]},
    **{
        f"mode-{mode}": {
            f"10.96.0.{number}:80/TCP": [f"{ONE}:8080", f"{TWO}:8080", f"{THREE}:8080"],
            f"*:300{number}/TCP": [f"{ONE}:8080", f"{TWO}:8080", f"{THREE}:8080"],
            f"10.96.0.{number + 1}:80/TCP": [f"{ONE}:8080", f"{TWO}:8080", f"{THREE}:8080"],
        }
        for mode, number in {"userspace": 31, "iptables": 33, "nftables": 35, "ipvs": 37}.items()
    },
    "compose": {"10.96.0.20:80/TCP": [], "*:30080/TCP": []},
}


async def load(folders: Sequence[Path], node: str = "") -> tuple[ProxyState, list[str]]:
    """Return the state that `run` would serve from *folders* on *node*, and its problems."""
    source = FileSource([str(folder) for folder in folders])
    tracker = Tracker(ManifestAllocations([CLUSTER_IP_RANGE]), here=Node(node))
    async for events in source.events():
        tracker.apply(events)
        if any(event.type is EventType.SYNCED for event in events):
            break
    state = tracker.state()
    return state, [*source.problems.values(), *tracker.problems.values()]


def served(state: ProxyState) -> dict[str, list[str]]:
    """Return the endpoints of each portal of *state*, as ``ip:port/PROTOCOL`` -> ``ip:port``."""
    return {
        f"{portal}/{portal.protocol}": [str(endpoint) for endpoint in state.endpoints[name] if endpoint.ready]
        for name, service_port in state.service_ports.items()
        for portal in portals(service_port)
    }


# How it is run, and not what is served; each has a test of its own.
HOW_TO_RUN = {"grafana", "kubernetes", "systemd"}


def test_every_folder_is_a_lesson_that_is_tested_here() -> None:
    assert {folder.name for folder in EXAMPLES.iterdir() if folder.is_dir()} == set(WHAT_IS_SERVED) | HOW_TO_RUN


@pytest.mark.parametrize("lesson", WHAT_IS_SERVED)
async def test_a_lesson_is_served_as_its_readme_says(lesson: str) -> None:
    state, problems = await load([EXAMPLES / lesson])

    assert problems == []
    assert served(state) == WHAT_IS_SERVED[lesson]


def faults(folders: Sequence[Path]) -> list[Finding]:
    """Return what `check` finds in *folders*, but for the note that only the lab makes Pods of a Deployment."""
    found = lint(*read_once([str(folder) for folder in folders]), OPTIONS)
    return [one for one in found if not (one.severity == "note" and "Deployment" in one.problem)]


@pytest.mark.parametrize("lesson", WHAT_IS_SERVED)
def test_check_finds_nothing_wrong_in_a_lesson(lesson: str) -> None:
    assert faults([EXAMPLES / lesson]) == []


@pytest.mark.parametrize("lesson", WHAT_IS_SERVED)
def test_a_lesson_has_a_readme_that_names_its_cluster_ips(lesson: str) -> None:
    readme = (EXAMPLES / lesson / "README.md").read_text()

    for portal in WHAT_IS_SERVED[lesson]:
        assert portal.partition(":")[0] in readme
    assert re.search(f"(run|lab)( --proxy-mode [a-z]+)? examples/{lesson}", readme) or lesson == "compose"
    assert f"({lesson}/)" in (EXAMPLES / "README.md").read_text()


async def test_all_lessons_can_be_served_together() -> None:
    state, problems = await load([EXAMPLES / lesson for lesson in WHAT_IS_SERVED])

    assert problems == []
    assert served(state) == {portal: who for lesson in WHAT_IS_SERVED.values() for portal, who in lesson.items()}


async def test_the_affinity_lesson_lasts_as_long_as_its_readme_says() -> None:
    state, _ = await load([EXAMPLES / "affinity"])

    assert [service_port.affinity_timeout_s for service_port in state.service_ports.values()] == [10]


@pytest.mark.parametrize(
    ("lesson", "node", "everybody", "outside"),
    [
        ("traffic-policy", "node", [ONE, TWO, THREE], [ONE, TWO]),
        ("traffic-policy", "node-2", [ONE, TWO, THREE], [THREE]),
        ("topology", "node", [ONE, THREE], []),
        ("topology", "node-2", [ONE, TWO, THREE], []),
    ],
)
async def test_a_node_uses_the_endpoints_that_the_lesson_states(
    lesson: str, node: str, everybody: list[str], outside: list[str]
) -> None:
    state, _ = await load([EXAMPLES / lesson], node)
    ((name, service_port),) = state.service_ports.items()

    found = reach(service_port, state.endpoints[name], state.node)

    assert [[endpoint.ip for endpoint in which] for which in (found.cluster, found.local)] == [everybody, outside]


async def test_the_backends_of_the_source_lesson_repeat_the_header() -> None:
    state, _ = await load([EXAMPLES / "source-ip"])
    backends = runpy.run_path(str(EXAMPLES / "backends.py"))

    assert [service_port.source_ip for service_port in state.service_ports.values()] == [SourceIP.PROXY_PROTOCOL_V1]
    assert {endpoint.port for found in state.endpoints.values() for endpoint in found} == {backends["PROXIED_PORT"]}
    with (
        backends["ThreadingHTTPServer"](("127.0.0.1", 0), backends["ProxiedAnswer"]) as server,
        socket.create_connection(server.server_address, timeout=5) as client,
    ):
        client.sendall(header_v1(("192.0.2.9", 4321), ("10.96.0.21", 80)) + b"GET / HTTP/1.0\r\n\r\n")
        server.handle_request()
        said = client.makefile("rb").read().decode().splitlines()
    assert said[-1].endswith(" PROXY TCP4 192.0.2.9 10.96.0.21 4321 80")


def test_readme_and_other_files_of_a_lesson_are_skipped() -> None:
    assert faults([folder for folder in EXAMPLES.iterdir() if folder.is_dir()]) == []
