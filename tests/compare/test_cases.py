"""A failed load has no figures: failing is fast and cheap, so they would mislead."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.compare.conftest import PutTool
from userspace_proxy.compare import cases
from userspace_proxy.compare.cases import CASES, Case
from userspace_proxy.compare.nodes import ModeNode
from userspace_proxy.compare.syscalls import calls_per_request
from userspace_proxy.errors import StartError

UNTIL_STOPPED = "while :; do sleep 0.02; done"
LOAD_S = 0.5
COUNTED = "100.00 0.1 10 200 read"  # as strace has it


def case_of(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def put_wrk(put_tool: PutTool, requests: int, failed: int) -> None:
    said = f"done {requests} 200000 10.0 20.0 30.0 {failed}"
    put_tool("wrk", f"trap 'echo {said}; exit 0' INT\n{UNTIL_STOPPED}")


def test_a_load_with_one_percent_of_failed_requests_has_figures(
    node: ModeNode, tmp_path: Path, put_tool: PutTool
) -> None:
    put_wrk(put_tool, requests=1000, failed=10)

    figures = case_of(cases.KEEPALIVE_64).run(node, LOAD_S)

    assert figures["rate"] == 5000
    assert figures["failed"] == 10


@pytest.mark.parametrize(
    ("requests", "failed", "said"),
    [(1000, 1000, "1,000 failures at 1,000 requests"), (1000, 11, "11 failures at"), (0, 64, "nothing was answered")],
)
def test_a_load_with_more_failed_requests_has_no_figures(
    node: ModeNode, tmp_path: Path, put_tool: PutTool, requests: int, failed: int, said: str
) -> None:
    put_wrk(put_tool, requests, failed)

    with pytest.raises(StartError, match=said):
        case_of(cases.NEW_64).run(node, LOAD_S)


def test_wrk_is_interrupted_again_until_it_ends(node: ModeNode, tmp_path: Path, put_tool: PutTool) -> None:
    """Real wrk sleeps on if the interrupt comes between the installation of its handler and its sleep."""
    again = "trap 'echo done 1000 200000 10.0 20.0 30.0 0; exit 0' INT"
    put_tool("wrk", f"""trap "{again}" INT\n{UNTIL_STOPPED}""")

    assert case_of(cases.NEW_1).run(node, LOAD_S)["rate"] == 5000


def test_system_calls_of_a_failed_load_are_not_counted(node: ModeNode, tmp_path: Path, put_tool: PutTool) -> None:
    put_wrk(put_tool, requests=1000, failed=1000)
    report = tmp_path / "calls"
    put_tool("strace", f"trap 'echo {COUNTED} > {report}; exit 0' INT\n{UNTIL_STOPPED}")

    with pytest.raises(StartError, match="1,000 failures"):
        calls_per_request(node, LOAD_S)


def test_the_cost_of_a_failed_attempt_of_iperf3_is_not_counted(
    node: ModeNode, tmp_path: Path, put_tool: PutTool
) -> None:
    (tmp_path / "said").write_text('{"end": {"sum_received": {"bytes": 1000000000, "seconds": 1.0}}}')
    put_tool(
        "iperf3",
        f"""cd {tmp_path}
if test -e first; then : > second; trap 'cat said; exit 0' INT; else : > first; trap 'echo busy; exit 1' INT; fi
{UNTIL_STOPPED}""",
    )
    node.start("sh", "-c", "while :; do :; done")  # uses all of a processor, all the time

    figures = case_of(cases.BULK_1).run(node, LOAD_S)

    second_took_s = time.time() - (tmp_path / "second").stat().st_mtime
    assert figures["rate"] == 1.0
    assert figures["proxy_cpu_s"] < second_took_s + 0.3
