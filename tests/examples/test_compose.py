"""docker-compose.yml says what the lesson needs; where a Docker engine answers, it is run for real as well.

The checks of the file need no engine. The run is skipped without one: nothing but an engine can tell whether it
works, and an imitation would only repeat what the checks have said.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import re
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.examples.test_examples import load, served
from tests.net.world import wait_until
from userspace_proxy.dataplane.sockets import reserve_refusing_port
from userspace_proxy.lab import Lab

PROJECT = Path(__file__).parents[2]
BACKENDS = ("backend-1", "backend-2", "backend-3")


@pytest.fixture(scope="module")
def compose_file() -> Any:
    return yaml.safe_load((PROJECT / "docker-compose.yml").read_text())


@pytest.fixture(scope="module")
def dockerfile() -> str:
    return (PROJECT / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def services(compose_file: Any) -> Any:
    """Those of the lesson: what starts without a profile."""
    return {name: service for name, service in compose_file["services"].items() if "profiles" not in service}


def address_of(service: Any) -> str:
    address: str = service["networks"]["pods"]["ipv4_address"]
    return address


# ---- what the file says


def test_there_are_three_backends_a_proxy_and_a_client(services: Any) -> None:
    assert set(services) == {*BACKENDS, "proxy", "client"}


@pytest.mark.parametrize("name", ["proxy", "client"])
def test_only_containers_that_change_routes_or_rules_have_net_admin(compose_file: Any, name: str) -> None:
    service = compose_file["services"][name]

    assert service["cap_drop"] == ["ALL"]
    assert service["cap_add"] == ["NET_ADMIN"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert not {"privileged", "network_mode", "pid", "ipc", "userns_mode", "devices"} & service.keys()


def test_backends_ask_for_no_privileges(compose_file: Any) -> None:
    for name in BACKENDS:
        assert not {"privileged", "cap_add", "network_mode"} & compose_file["services"][name].keys()


async def test_the_manifest_that_is_mounted_names_the_backends_addresses(compose_file: Any, dockerfile: str) -> None:
    services = compose_file["services"]
    [mount] = services["proxy"]["volumes"]
    source, target, mode = mount.split(":")
    state, problems = await load([PROJECT / source])

    assert problems == []
    assert (target, mode) == ("/manifests", "ro")
    assert 'CMD ["run", "/manifests"]' in dockerfile
    [(portal, endpoints)] = served(state).items()
    assert [endpoint.partition(":")[0] for endpoint in endpoints] == [address_of(services[b]) for b in BACKENDS]
    assert portal == f"{services['client']['environment']['CLUSTER_IP']}:80/TCP"


def test_the_client_reaches_cluster_ips_by_way_of_the_proxy(compose_file: Any) -> None:
    client = compose_file["services"]["client"]
    told = client["environment"]

    assert told["PROXY"] == address_of(compose_file["services"]["proxy"])
    assert ipaddress.ip_address(told["CLUSTER_IP"]) in ipaddress.ip_network(told["SERVICE_RANGE"])
    assert client["depends_on"] == {name: {"condition": "service_healthy"} for name in ("proxy", *BACKENDS)}


def test_every_address_is_unique_and_in_the_subnet(compose_file: Any, services: Any) -> None:
    [config] = compose_file["networks"]["pods"]["ipam"]["config"]
    subnet = ipaddress.ip_network(config["subnet"])
    addresses = [ipaddress.ip_address(address_of(service)) for service in services.values()]

    assert len(set(addresses)) == len(addresses)
    # The first one is the bridge's.
    assert set(addresses) <= set(list(subnet.hosts())[1:])


def test_images_are_pinned(compose_file: Any, dockerfile: str) -> None:
    images = [*(service["image"] for service in compose_file["services"].values()), *base_images(dockerfile)]

    for image in images:
        _, colon, tag = image.partition(":")
        assert colon, image
        assert tag != "latest", image


def test_every_mounted_file_exists_and_is_read_only(services: Any) -> None:
    for service in services.values():
        for mount in service["volumes"]:
            source, _, mode = mount.split(":")
            assert (PROJECT / source).exists()
            assert mode == "ro"


def test_every_container_that_serves_has_a_health_check(compose_file: Any, dockerfile: str) -> None:
    assert "http://127.0.0.1:10256/healthz" in dockerfile.partition("HEALTHCHECK")[2]
    for name in BACKENDS:
        assert "http://127.0.0.1:8080/" in compose_file["services"][name]["healthcheck"]["test"]


def test_every_source_of_the_image_exists_and_is_in_the_build_context(dockerfile: str) -> None:
    sent = {line[1:] for line in (PROJECT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source
        for arguments in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.MULTILINE)
        for source in arguments.split()
    }

    assert copied == sent
    assert all((PROJECT / source).exists() for source in copied)


def stages(dockerfile: str) -> list[tuple[str, str]]:
    """Return what each stage begins with, and its name ("" for the last one)."""
    return re.findall(r"^FROM (\S+)(?: AS (\S+))?$", dockerfile, re.MULTILINE)


def base_images(dockerfile: str) -> list[str]:
    named = {name for _, name in stages(dockerfile)}
    return [image for image, _ in stages(dockerfile) if image not in named]


def test_the_proxys_image_does_not_contain_the_comparisons_tools(compose_file: Any, dockerfile: str) -> None:
    built = {name: service["build"] for name, service in compose_file["services"].items() if "build" in service}

    assert built == {name: {"context": ".", "target": name} for name in ("proxy", "compare")}
    assert stages(dockerfile)[-2:] == [("proxy", "compare"), ("proxy", "")]


def test_the_comparison_has_its_profile_and_only_the_capabilities_it_needs(compose_file: Any) -> None:
    service = compose_file["services"]["compare"]

    assert service["profiles"] == ["compare"]
    assert service["cap_drop"] == ["ALL"]
    assert service["cap_add"] == ["SYS_ADMIN", "NET_ADMIN", "SYS_PTRACE"]
    assert service["security_opt"] == ["no-new-privileges:true", "apparmor:unconfined"]
    assert service["read_only"] is True
    assert service["network_mode"] == "none"
    assert not {"privileged", "pid", "ipc", "userns_mode", "devices"} & service.keys()


def test_the_comparison_writes_its_report_where_a_folder_is_mounted(compose_file: Any, dockerfile: str) -> None:
    service = compose_file["services"]["compare"]
    options = service["command"][service["command"].index("--html") :]

    assert service["volumes"] == ["./report:/report"]
    assert options == ["--html", "/report/report.html", "--json", "/report/figures.json"]
    assert f"CMD {json.dumps(['compare', *options])}" in dockerfile
    assert "/report/" in (PROJECT / ".gitignore").read_text().splitlines()


# ---- where containers differ from other hosts


def test_a_port_is_reserved_if_ipv6_is_disabled_as_in_containers() -> None:
    with Lab() as lab:
        host = lab.add("container")
        for knob in ("all", "lo"):
            host.run("sysctl", "-qw", f"net.ipv6.conf.{knob}.disable_ipv6=1")
        with host.inside():
            tcp, udp = reserve_refusing_port(10_000)
        with tcp, udp:
            assert tcp.getsockname()[1] == udp.getsockname()[1] == 10_000


# ---- the run


class Round(NamedTuple):
    """A line of the client: who answered how often, and how many requests have failed since the start."""

    answered: dict[str, int]
    failed: int


class Composed:
    """The project of docker-compose.yml under a name of its own."""

    def __init__(self, tool: Sequence[str]) -> None:
        self._command = [*tool, "--project-name", f"userspace-proxy-test-{uuid.uuid4().hex[:8]}"]
        self._command += ["--file", str(PROJECT / "docker-compose.yml")]

    def run(self, *arguments: str, timeout_s: float = 60.0) -> str:
        done = outside(*self._command, *arguments, timeout_s=timeout_s)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def rounds(self) -> list[Round]:
        said = re.findall(r"answered: (.*)failed since the start: (\d+)", self.run("logs", "--no-color", "client"))
        return [Round({n: int(c) for n, c in re.findall(r"(\S+) (\d+), ", who)}, int(f)) for who, f in said]

    def next_rounds(self, count: int) -> list[Round]:
        """Return the *count* rounds that follow the one that is under way."""
        before = len(self.rounds()) + 1
        wait_until(lambda: len(self.rounds()) >= before + count, f"the client has said {count} lines more", 60.0)
        return self.rounds()[before : before + count]


def outside(*command: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run *command* where the engine's socket can be seen: without the /run that the tests have of their own."""
    shown = ["unshare", "--mount", "sh", "-c", 'umount --lazy /run && exec "$@"', "sh", *command]
    return subprocess.run(
        shown, capture_output=True, text=True, timeout=timeout_s, check=False, stdin=subprocess.DEVNULL
    )


def is_answered(*command: str, timeout_s: float = 3.0) -> bool:
    try:
        done = outside(*command, timeout_s=timeout_s)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0 and bool(done.stdout.strip())


def compose_tool() -> list[str]:
    """Return the command that composes; skip the test where none is, or no engine, or no image can be had."""
    if not is_answered("docker", "info", "--format", "{{.ServerVersion}}"):
        pytest.skip("no Docker engine answers here; the checks of the file are made all the same")
    tools = (["docker", "compose"], ["docker-compose"])
    tool = next((tool for tool in tools if is_answered(*tool, "version", "--short", timeout_s=10)), None)
    if tool is None:
        pytest.skip("neither `docker compose` nor `docker-compose` is installed")
    for image in {"nginx:1.28-alpine", *base_images((PROJECT / "Dockerfile").read_text())}:
        present = is_answered("docker", "image", "inspect", "--format", "{{.Id}}", image)
        if not present and not is_answered("docker", "pull", "--quiet", image, timeout_s=120):
            pytest.skip(f"the engine has no image {image} and cannot pull it")
    return tool


@pytest.fixture
def composed() -> Iterator[Composed]:
    project = Composed(compose_tool())
    with contextlib.ExitStack() as stack:
        stack.callback(project.run, "down", "--volumes", "--timeout", "2")
        project.run("up", "--detach", "--build", timeout_s=300)
        yield project


@pytest.mark.timeout(600)
def test_containers_are_balanced_and_no_request_fails_while_a_backend_is_stopped(composed: Composed) -> None:
    [before] = composed.next_rounds(1)
    composed.run("stop", "backend-2")
    [without] = composed.next_rounds(1)
    composed.run("start", "backend-2")
    wait_until(lambda: "backend-2" in composed.rounds()[-1].answered, "backend-2 answers again", 90.0)

    assert before.answered == {"backend-1": 10, "backend-2": 10, "backend-3": 10}
    assert set(without.answered) == {"backend-1", "backend-3"}
    assert sum(without.answered.values()) == 30
    assert composed.rounds()[-1].failed == 0


@pytest.mark.timeout(600)
def test_the_comparison_measures_every_mode_in_one_container(tmp_path: Path) -> None:
    project = Composed([*compose_tool(), "--profile", "compare"])
    with contextlib.ExitStack() as stack:
        stack.callback(project.run, "down", "--volumes", "--timeout", "2")
        project.run("build", "compare", timeout_s=300)

        options = ("--duration", "25s", "--cases", "rates,system-calls")
        outputs = ("--html", "/report/a.html", "--json", "/report/a.json")
        there = ("--rm", "--volume", f"{tmp_path}:/report", "compare")
        project.run("run", *there, "compare", *options, *outputs, timeout_s=120)

    found = json.loads((tmp_path / "a.json").read_text())
    absent = {mode["name"]: mode["reason"] for mode in found["modes"] if mode["reason"]}
    assert set(absent) <= {"ipvs"}, absent  # its kernel module is the machine's matter
    assert not any("system calls" in note for note in found["notes"])
    assert "<html" in (tmp_path / "a.html").read_text()
