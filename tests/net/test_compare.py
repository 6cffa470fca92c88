"""`compare` measures, writes its results, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.net.world import processes_with, wait_until
from userspace_proxy.compare import cases
from userspace_proxy.compare.modes import USERSPACE
from userspace_proxy.compare.results import DIRECT, DIRECT_AGAIN, from_json

COMPARE = [sys.executable, "-m", "userspace_proxy", "compare", "--modes", "userspace"]


def test_a_short_run_has_sane_figures_and_a_report(tmp_path: Path) -> None:
    left_before = {*Path("/run/netns").iterdir()}
    files = ["--json", str(tmp_path / "run.json"), "--html", str(tmp_path / "run.html")]
    command = [*COMPARE, "--duration", "8s", "--cases", "latency,throughput", *files]

    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)

    assert done.returncode == 0, done.stderr
    results = from_json((tmp_path / "run.json").read_bytes())
    assert [mode.name for mode in results.ran()] == [DIRECT, DIRECT_AGAIN, USERSPACE]
    assert not results.notes
    for case in (cases.KEEPALIVE_1, cases.NEW_1, cases.BULK_1, cases.BULK_8):
        for mode in results.ran():
            assert len(results.figures(case, mode.name, "rate")) == results.rounds
    for seen in (s.figures for s in results.samples if s.case == cases.KEEPALIVE_1):
        assert 0 < seen["p50_ms"] <= seen["p99_ms"] <= seen["p999_ms"]
        assert seen["machine_cpu_s"] > 0
        assert seen["failed"] == 0
    # A request and its answer wake the proxy once each; the direct way has no process to wake.
    assert all(s > 1 for s in results.figures(cases.KEEPALIVE_1, USERSPACE, "switches").values())
    assert not any(results.figures(cases.KEEPALIVE_1, DIRECT, "switches").values())
    assert "\x1b" not in done.stdout
    assert "Userspace is slow" in done.stdout
    assert "Userspace is slow" in (tmp_path / "run.html").read_text()
    assert {*Path("/run/netns").iterdir()} == left_before


def test_ctrl_c_ends_it_and_keeps_the_last_report(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    report.write_text("the last one")
    command = [*COMPARE, "--duration", "60s", "--html", str(report), "--json", str(tmp_path / "run.json")]
    mark = f"RUN_OF_COMPARE={tmp_path}"
    with subprocess.Popen(
        ["env", mark, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    ) as compare:
        wait_until(lambda: any("/userspace/manifests" in line for line in processes_with(mark)), "the proxy runs")

        os.killpg(compare.pid, signal.SIGINT)  # as a terminal does
        said = compare.communicate(timeout=20)[1]

        assert compare.returncode == 1
        assert said.strip().endswith("stopped")
        wait_until(lambda: not processes_with(mark), "its processes have ended")
    assert report.read_text() == "the last one"
    assert [*tmp_path.iterdir()] == [report]


def test_a_report_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    command = [*COMPARE, "--html", str(tmp_path / "missing" / "report.html")]

    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)

    assert done.returncode == 1
    assert done.stderr == f"userspace-proxy: {tmp_path}/missing/report.html: No such file or directory\n"


def test_an_unknown_case_is_a_usage_error() -> None:
    done = subprocess.run([*COMPARE, "--cases", "speed"], capture_output=True, text=True, timeout=20, check=False)

    assert done.returncode == 2
    assert "'speed' is none of latency" in done.stderr
