"""docker-compose.yml says what the lesson needs; where a Docker engine answers, it is run for real as well.

The checks of the file need no engine. The run is skipped without one: nothing but an engine can tell whether it
works, and an imitation would only repeat what the checks have said.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import re
import socket
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.net.world import wait_until
from userspace_proxy import api
from userspace_proxy.api.events import EventType
from userspace_proxy.control import decode
from userspace_proxy.dataplane.sockets import reserve_refusing_port
from userspace_proxy.lab import Lab
from userspace_proxy.sources.files import FileSource

PROJECT = Path(__file__).parents[2]
PROXIES, CLIENTS = ("proxy", "proxy-nftables"), ("client", "client-nftables")


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


# ---- what the file says


def test_there_are_backends_a_proxy_and_a_client_and_the_same_in_nftables_mode(compose_file: Any) -> None:
    profiles = {name: service.get("profiles") for name, service in compose_file["services"].items()}

    assert {name for name, profile in profiles.items() if profile is None} == {"web", "proxy", "client"}
    assert {name for name, profile in profiles.items() if profile == ["nftables"]} == {
        "proxy-nftables",
        "client-nftables",
    }
    assert compose_file["services"]["web"]["scale"] == 3


@pytest.mark.parametrize("name", [*PROXIES, *CLIENTS])
def test_only_containers_that_change_routes_or_rules_have_net_admin(compose_file: Any, name: str) -> None:
    service = compose_file["services"][name]

    assert service["cap_drop"] == ["ALL"]
    assert service["cap_add"] == ["NET_ADMIN"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert not {"privileged", "network_mode", "pid", "ipc", "userns_mode", "devices"} & service.keys()


def test_backends_need_no_privileges(compose_file: Any) -> None:
    assert not {"privileged", "cap_add", "network_mode"} & compose_file["services"]["web"].keys()


def test_nothing_is_fixed_that_a_second_project_or_a_further_container_would_need(compose_file: Any) -> None:
    assert "networks" not in compose_file
    for name in ("web", *PROXIES, *CLIENTS):
        service = compose_file["services"][name]
        assert not {"networks", "container_name", "hostname", "image"} & service.keys()
        for port in service.get("ports", ()):
            assert re.match(r"\$\{[A-Z_]+:-\d+\}:", port), port


def test_no_file_of_the_checkout_is_mounted(services: Any) -> None:
    """A container without capabilities cannot read a checkout that was made with umask 077."""
    assert not any("volumes" in service for service in services.values())


async def test_the_services_endpoints_are_the_containers_of_the_backends(dockerfile: str) -> None:
    [(service, target)] = await named_in("examples/compose/web.yaml")

    assert target == ("web", 8080)
    assert service.metadata.annotations is not None
    assert "userspace-proxy/health-check" in service.metadata.annotations
    assert "listen 8080;" in (PROJECT / "examples/compose/nginx.conf").read_text()
    assert "FROM proxy AS demo-proxy\nCOPY examples/compose/web.yaml /manifests/" in dockerfile


async def named_in(path: str) -> list[tuple[api.Service, Any]]:
    found: list[tuple[api.Service, Any]] = []
    async for events in FileSource([str(PROJECT / path)]).events():
        for event in events:
            if event.type is EventType.SYNCED:
                return found
            assert isinstance(event.object, api.Service)
            found.append((event.object, decode.dns_target(event.object)))
    raise AssertionError("the source ended")


async def test_the_host_reaches_the_services_node_port(compose_file: Any) -> None:
    [(service, _)] = await named_in("examples/compose/web.yaml")
    assert service.spec is not None
    assert service.spec.ports is not None

    for name in PROXIES:
        [port] = compose_file["services"][name]["ports"]
        assert port.rpartition(":")[2] == str(service.spec.ports[0].node_port)


@pytest.mark.parametrize(("proxy", "client"), list(zip(PROXIES, CLIENTS, strict=True)))
async def test_a_client_reaches_cluster_ips_by_way_of_its_proxy(compose_file: Any, proxy: str, client: str) -> None:
    [(service, _)] = await named_in("examples/compose/web.yaml")
    told = compose_file["services"][client]["environment"]

    assert told["PROXY"] == proxy
    assert service.spec is not None
    assert service.spec.cluster_ip is not None
    for address in (service.spec.cluster_ip, *compose_file["services"][client]["dns"]):
        assert ipaddress.ip_address(address) in ipaddress.ip_network(told["SERVICE_RANGE"])
    depends = compose_file["services"][client]["depends_on"]
    assert depends == {name: {"condition": "service_healthy"} for name in (proxy, "web")}


def test_in_nftables_mode_packets_are_forwarded_and_masqueraded(compose_file: Any) -> None:
    service = compose_file["services"]["proxy-nftables"]

    assert service["command"] == ["run", "/manifests", "--dns", "--proxy-mode=nftables", "--masquerade-all"]
    assert service["sysctls"] == {"net.ipv4.ip_forward": 1, "net.ipv4.ip_unprivileged_port_start": 53}


def test_images_are_pinned_by_tag_and_digest(dockerfile: str) -> None:
    for image in base_images(dockerfile):
        assert re.fullmatch(r"[a-z]+:[a-z0-9.-]+@sha256:[0-9a-f]{64}", image), image
        assert ":latest" not in image


def test_every_container_that_serves_has_a_health_check(compose_file: Any, dockerfile: str) -> None:
    assert "http://127.0.0.1:10256/healthz" in dockerfile.partition("HEALTHCHECK")[2]
    assert "http://127.0.0.1:8080/" in compose_file["services"]["web"]["healthcheck"]["test"]


def test_every_source_of_the_image_exists_and_is_in_the_build_context(dockerfile: str) -> None:
    sent = {line[1:] for line in (PROJECT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        source
        for arguments in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.MULTILINE)
        for source in arguments.split()
    }

    assert {source for source in copied if not source.startswith("examples/compose/")} == sent - {"examples/compose"}
    assert all((PROJECT / source).exists() for source in copied)


def stages(dockerfile: str) -> list[tuple[str, str]]:
    """Return what each stage begins with, and its name ("" for the last one)."""
    return re.findall(r"^FROM (\S+)(?: AS (\S+))?$", dockerfile, re.MULTILINE)


def base_images(dockerfile: str) -> list[str]:
    named = {name for _, name in stages(dockerfile)}
    return [image for image, _ in stages(dockerfile) if image not in named]


def test_the_proxys_image_does_not_contain_the_comparisons_tools(compose_file: Any, dockerfile: str) -> None:
    built = {name: service["build"] for name, service in compose_file["services"].items() if "build" in service}

    targets = {"web": "demo-web", "compare": "compare"}
    targets |= dict.fromkeys(PROXIES, "demo-proxy") | dict.fromkeys(CLIENTS, "demo-client")
    assert built == {name: {"context": ".", "target": target} for name, target in targets.items()}
    assert stages(dockerfile)[-2:] == [("proxy", "compare"), ("proxy", "")]


def test_the_comparison_has_its_profile_and_only_the_capabilities_it_needs(compose_file: Any) -> None:
    service = compose_file["services"]["compare"]

    assert service["profiles"] == ["compare"]
    assert service["cap_drop"] == ["ALL"]
    assert service["cap_add"] == ["SYS_ADMIN", "NET_ADMIN", "DAC_OVERRIDE", "SYS_PTRACE"]
    assert service["security_opt"] == ["no-new-privileges:true", "apparmor:unconfined"]
    assert service["read_only"] is True
    assert service["network_mode"] == "none"
    assert not {"privileged", "pid", "ipc", "userns_mode", "devices"} & service.keys()


def test_the_comparison_writes_its_report_where_a_folder_is_mounted(compose_file: Any, dockerfile: str) -> None:
    service = compose_file["services"]["compare"]
    options = service["command"][service["command"].index("--html") :]

    assert service["volumes"] == ["${REPORT:-./report}:/report"]
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
        with socket.create_server(("127.0.0.1", 0)) as sock:
            port = sock.getsockname()[1]
        self._command = ["env", f"PORT={port}", *tool]
        self._command += ["--project-name", f"userspace-proxy-test-{uuid.uuid4().hex[:8]}"]
        self._command += ["--file", str(PROJECT / "docker-compose.yml")]

    def run(self, *arguments: str, timeout_s: float = 60.0) -> str:
        done = outside(*self._command, *arguments, timeout_s=timeout_s)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def rounds(self) -> list[Round]:
        log = self.run("logs", "--no-color", "client")
        said = re.findall(r"answered: (.*)slowest \d+ ms; failed since the start: (\d+)", log)
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
    for image in base_images((PROJECT / "Dockerfile").read_text()):
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
def test_containers_are_balanced_and_no_request_fails_while_backends_are_added_and_killed(composed: Composed) -> None:
    [before] = composed.next_rounds(1)
    composed.run("up", "--detach", "--no-build", "--scale", "web=5")
    wait_until(lambda: len(composed.rounds()[-1].answered) == 5, "five backends answer", 90.0)
    killed = next(iter(composed.rounds()[-1].answered))  # its name is the ID of its container
    assert outside("docker", "kill", killed, timeout_s=30).returncode == 0
    wait_until(lambda: len(composed.rounds()[-1].answered) == 4, "four backends answer", 90.0)

    assert sorted(before.answered.values()) == [10, 10, 10]
    assert killed not in composed.rounds()[-1].answered
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
