"""Flags, metrics and files that the operation pages name exist."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.admin.scrape import every_metric
from userspace_proxy.cli import COMMANDS, load
from userspace_proxy.cli.options import settings_of

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "examples" / "systemd" / "userspace-proxy.service"
MANIFESTS = ROOT / "examples" / "kubernetes"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*/*.md"))]
# Options of tools that pages show.
FOREIGN = {"--help", "--user", "--map-root-user", "--net", "--cleanup"}


def unit_lines(key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", UNIT.read_text(), re.MULTILINE)


def test_the_unit_starts_what_the_command_line_takes() -> None:
    (command,) = unit_lines("ExecStart")
    _, name, *arguments = shlex.split(command)
    run = load(name)

    assert run.make_context("run", list(arguments)).params["paths"] == ("/etc/userspace-proxy",)


def test_the_unit_lets_workers_serve_on_and_gives_one_privilege() -> None:
    assert unit_lines("KillMode") == ["process"], "else systemd kills the workers with their control process"
    assert unit_lines("Restart") == ["always"]
    assert unit_lines("CapabilityBoundingSet") == ["CAP_NET_ADMIN"]
    assert "-USR2" in unit_lines("ExecReload")[0]


@pytest.mark.parametrize(("variant", "health_port"), [("beside", 10266), ("in-place-of", 10256)])
def test_the_daemon_sets_start_what_the_command_line_takes(variant: str, health_port: int) -> None:
    (daemon_set,) = yaml.safe_load_all((MANIFESTS / f"{variant}-kube-proxy.yaml").read_text())
    pod = daemon_set["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    command, *arguments = container["args"]

    given = settings_of(load(command).make_context(command, list(arguments)).params)
    assert (given.in_cluster, given.hostname_override) == (True, "$(NODE_NAME)")
    assert given.healthz_bind_address.endswith(f":{health_port}")
    assert {container[probe]["httpGet"]["port"] for probe in ("livenessProbe", "readinessProbe")} == {health_port}
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["NET_ADMIN"]}
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    assert (pod["hostNetwork"], pod["priorityClassName"]) == (True, "system-node-critical")
    assert pod["tolerations"] == [{"operator": "Exists"}]
    assert "ports" not in container, "two of them must be able to stand on one node"
    assert daemon_set["spec"]["updateStrategy"]["rollingUpdate"]["maxSurge"] == 1


def test_the_service_account_may_do_what_kube_proxy_may() -> None:
    account, binding = yaml.safe_load_all((MANIFESTS / "rbac.yaml").read_text())

    assert binding["roleRef"]["name"] == "system:node-proxier"
    (subject,) = binding["subjects"]
    assert (subject["namespace"], subject["name"]) == (account["metadata"]["namespace"], account["metadata"]["name"])


def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd here; the other tests read the unit by themselves")
    there = tmp_path / UNIT.name
    there.write_text(UNIT.read_text().replace("/opt/userspace-proxy/bin/userspace-proxy", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", str(there)], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_metric_that_is_named_exists(page: Path) -> None:
    exposed = every_metric()

    for metric in re.findall(r"`(userspace_proxy_\w+)`", page.read_text()):
        assert f"\n{metric}" in exposed, metric


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_that_is_named_exists(page: Path) -> None:
    known = {option for name in COMMANDS for p in load(name).params for option in p.opts}

    for option in re.findall(r"`(--[a-z][a-z-]*)", page.read_text()):
        assert option in known | FOREIGN, option
