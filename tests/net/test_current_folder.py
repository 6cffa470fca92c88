"""No file of the current folder runs with the proxy's privileges."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.net.world import Proxy, answers, serve_web, wait_until
from userspace_proxy.host.tool import find_tool
from userspace_proxy.lab import ServiceLab

# What the control process, a worker and a start anew import: of Python's own, of libraries and of ours.
MODULES = ["runpy", "msgspec", "uvloop", "aiohttp", "yaml", "prometheus_client", "sitecustomize"]
TOOLS = ["nft", "ip", "iptables", "conntrack", "iptables-save", "modprobe"]


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A folder of another user: any code that runs from there writes to the file ``caught``."""
    folder = tmp_path / "trap"
    folder.mkdir()
    for module in MODULES:
        (folder / f"{module}.py").write_text(f"open({str(folder / 'caught')!r}, 'a').write('{module}.py ')\n")
    for tool in TOOLS:
        (folder / tool).write_text(f"#!/bin/sh\nprintf '{tool} ' >> {folder}/caught\n")
        (folder / tool).chmod(0o755)
    return folder


def test_a_proxy_imports_no_module_and_runs_no_tool_of_the_current_folder(
    fresh_proxy: Proxy, world: ServiceLab, trap: Path
) -> None:
    script = str(Path(sys.executable).with_name("userspace-proxy"))
    serve_web(fresh_proxy)
    environment = {**os.environ, "PATH": f".:{os.environ['PATH']}:", "PYTHONPATH": f".:{trap.name}::"}
    with fresh_proxy.log_file.open("w") as log:
        command = ["sh", "-c", f'cd {trap} && exec "$@"', "sh", script, *fresh_proxy.run_arguments()]
        # What starts it, `ip netns exec`, is not what is tested: it is found by a PATH without that folder.
        inside = ["env", f"PATH={environment['PATH']}", f"PYTHONPATH={environment['PYTHONPATH']}", *command]
        fresh_proxy.process = subprocess.Popen(world.node.command(*inside), stdout=log, stderr=log)
    world.node.processes.append(fresh_proxy.process)
    fresh_proxy.wait_ready()
    caught = trap / "caught"
    assert answers(world.client, "10.96.4.1", 80)
    (before,) = fresh_proxy.workers()

    fresh_proxy.process.send_signal(signal.SIGUSR2)
    wait_until(lambda: "taken over" in fresh_proxy.log() and fresh_proxy.workers() != [before], "it is started anew")
    fresh_proxy.wait_ready()

    assert answers(world.client, "10.96.4.1", 80)
    assert fresh_proxy.stop() == 0
    assert not caught.exists() or caught.read_text() == "sitecustomize.py ", "Python's own import, before any of ours"


def test_the_module_run_by_python_m_imports_its_libraries_from_elsewhere(trap: Path, tmp_path: Path) -> None:
    (trap / "runpy.py").unlink()  # Python imports it before the first line of ours
    (tmp_path / "manifests").mkdir()
    command = [sys.executable, "-m", "userspace_proxy", "check", str(tmp_path / "manifests")]

    subprocess.run(command, cwd=trap, capture_output=True, check=False, timeout=60)

    assert not (trap / "caught").exists()


@pytest.mark.parametrize("path", [".", "", ":", "trap", "./trap:trap/"])
def test_a_tool_is_never_one_of_a_relative_entry_of_path(
    monkeypatch: pytest.MonkeyPatch, trap: Path, path: str
) -> None:
    monkeypatch.chdir(trap.parent if "trap" in path else trap)
    monkeypatch.setenv("PATH", path)

    assert (find_tool("nft") or "").startswith("/usr")


def test_an_absolute_entry_of_path_comes_first(monkeypatch: pytest.MonkeyPatch, trap: Path) -> None:
    monkeypatch.setenv("PATH", f".:{trap}")

    assert find_tool("nft") == str(trap / "nft")
