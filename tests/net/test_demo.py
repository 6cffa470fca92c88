"""`demo` shows balancing, failover and refusal, fits a small terminal, and leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.net.world import processes_with, wait_until

DEMO = [sys.executable, "-m", "userspace_proxy", "demo"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*DEMO, *arguments], capture_output=True, text=True, timeout=50, check=False)


def test_the_demo_serves_fails_over_refuses_and_leaves_nothing() -> None:
    left_before = {*Path("/run/netns").iterdir()}

    done = run("--json")

    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["round_robin"] == ["pod1", "pod2", "pod3"] * 3
    assert seen["affinity"] == {"client": ["pod1"] * 4, "pod1": ["pod2"] * 4}
    assert seen["failover"]["failed"] == 0
    assert set(seen["failover"]["answers"]) == {"pod1", "pod2", "pod3"}
    assert seen["kernel_mode"]["mode"] == "nftables"
    assert seen["kernel_mode"]["failed"] > 0
    assert seen["no_endpoints"] == "connection refused"
    assert seen["stop"] == {"exit_code": 0, "rules_left": False}
    assert {*Path("/run/netns").iterdir()} == left_before


def test_in_a_pipe_it_is_plain_text_that_fits_a_terminal_of_80_by_24() -> None:
    done = run()

    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert len(lines) <= 24, done.stdout
    assert max(map(len, lines)) <= 80, done.stdout
    assert lines[-4].startswith("Try next")
    assert any(line.startswith(" nftables") and "%)" in line for line in lines), done.stdout


def test_forbidden_namespaces_are_reported_with_advice(tmp_path: Path) -> None:
    # The kernel makes no user namespaces for a process whose root is not the root of its mount namespace.
    forbid = 'mount --rbind / "$0" && exec chroot "$0" setpriv --bounding-set=-all --inh-caps=-all "$@"'
    isolated = ["unshare", "--mount", "sh", "-c", forbid, str(tmp_path), "env", "-C", str(Path.cwd()), *DEMO]

    done = subprocess.run(isolated, capture_output=True, text=True, timeout=20, check=False)

    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "namespaces are forbidden here" in done.stderr
    assert "run it outside of the chroot" in done.stderr


def test_sigterm_ends_the_demo_and_its_processes(tmp_path: Path) -> None:
    mark = f"RUN_OF_DEMO={tmp_path}"
    with subprocess.Popen(["env", mark, *DEMO], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        while "round robin" not in demo.stdout.readline():
            assert demo.poll() is None
        assert len(processes_with(mark)) > 1

        demo.terminate()

        assert demo.wait(20) != 0
        wait_until(lambda: not processes_with(mark), "its processes have ended")
