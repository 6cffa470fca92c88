"""The findings that `run` logs while it serves manifests: each once, also after edits."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.control.given import OPTIONS
from userspace_proxy.control.advice import Advisor
from userspace_proxy.sources.files import FileSource

LOGGER = "userspace_proxy.control.advice"
WEB = """\
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web-1, labels: {app: web}}
status: {podIP: 10.244.0.2}
"""
UNSERVED = """\
---
apiVersion: v1
kind: Service
metadata: {name: a, annotations: {userspace-proxy/ipvs-scheduler: lc}}
spec: {type: LoadBalancer, selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: b}
spec: {type: ExternalName, externalName: example.org}
---
apiVersion: v1
kind: Service
metadata: {name: c}
spec: {clusterIP: None, ports: [{port: 80}]}
"""


@asynccontextmanager
async def advised(file: Path, mode: str = "userspace") -> AsyncIterator[Advisor]:
    """Read *file* as a source, and check it as `run` does."""
    advisor = Advisor(replace(OPTIONS, mode=mode, names_unserved=True))
    source = FileSource([str(file)])
    source.observer = advisor

    async def follow() -> None:
        async for _ in source.events():
            pass

    tasks = [asyncio.create_task(follow()), asyncio.create_task(advisor.run())]
    try:
        yield advisor
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not is_so():
            await asyncio.sleep(0.01)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]


async def test_a_selector_that_matches_nothing_after_an_edit_is_one_warning_and_its_end_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    file = tmp_path / "web.yaml"
    file.write_text(WEB)
    async with advised(file) as advisor:
        file.write_text(WEB.replace("labels: {app: web}", "labels: {app: wbe}"))
        await until(lambda: bool(said(caplog)))
        file.write_text("# a line above\n" + file.read_text())
        await until(lambda: advisor.faults[0].startswith(f"{file}:5: "))
        file.write_text(WEB)
        await until(lambda: len(said(caplog)) > 1)

        assert said(caplog) == [
            f"{file}:4: Service default/web: spec.selector.app: the selector app=web matches no Pod here; "
            "did you mean 'app: wbe'?",
            "Service default/web: spec.selector.app: no longer so: the selector app=web matches no Pod here",
        ]
        assert [record.levelname for record in caplog.records if record.name == LOGGER] == ["WARNING", "INFO"]
        assert advisor.faults == []


async def test_unserved_and_waiting_services_and_ignored_annotations_are_one_line_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    file = tmp_path / "web.yaml"
    file.write_text(WEB + UNSERVED)
    async with advised(file) as advisor:
        await until(lambda: len(said(caplog)) >= 4)

        annotation = "metadata.annotations.userspace-proxy/ipvs-scheduler"
        assert {line.partition(": ")[2].partition(";")[0] for line in said(caplog)} == {
            "Service default/a: spec.type: it waits for a load balancer's address",
            f"Service default/a: {annotation}: it has no effect in userspace mode",
            "Service default/b: spec.type: an ExternalName Service is left to DNS",
            "Service default/c: spec.clusterIP: a headless Service is left to DNS",
        }
        assert advisor.faults == []


async def test_of_many_findings_at_once_some_are_logged_and_the_others_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "many.yaml"
    file.write_text("---\n".join(WEB.partition("---")[0].replace("web}", f"web-{n}}}", 1) for n in range(30)))
    caplog.set_level(logging.INFO, LOGGER)
    async with advised(file):
        await until(lambda: len(said(caplog)) > 20)

        assert said(caplog)[-1] == "10 more findings; 'userspace-proxy check' shows all"


async def test_a_large_file_is_checked_in_turns_that_the_event_loop_has_left(tmp_path: Path) -> None:
    def is_checking() -> bool:
        return any(thread.name == "lint" for thread in threading.enumerate())

    file = tmp_path / "many.yaml"
    file.write_text("---\n".join(WEB.replace("web", f"web-{number}") for number in range(300)) + UNSERVED)
    async with advised(file, "iptables") as advisor:
        await until(is_checking)
        while is_checking():
            time.sleep(0.001)  # the event loop is busy, but leaves the interpreter to the check

        assert advisor.faults == []
        await until(lambda: bool(advisor.faults))


async def test_a_fault_that_run_reports_is_not_reported_twice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)
    file = tmp_path / "web.yaml"
    file.write_text(WEB.replace("spec: {", "spec: {clusterIP: none, trafficDistribution: Near, "))
    async with advised(file):
        await until(lambda: bool(said(caplog)))

        (line,) = said(caplog)
        assert "spec.trafficDistribution" in line


async def test_a_finding_names_the_line_where_its_document_is_now(tmp_path: Path) -> None:
    file = tmp_path / "web.yaml"
    wrong = WEB.replace("labels: {app: web}", "labels: {app: web}, annotations: {a b: c}")
    file.write_text(wrong)
    async with advised(file) as advisor:
        await until(lambda: bool(advisor.faults))
        assert advisor.faults[0].startswith(f"{file}:8: Pod default/web-1: ")

        file.write_text(wrong.replace("---\n", "# a line\n# and one more\n---\n"))
        await until(lambda: advisor.faults[0].startswith(f"{file}:10: Pod default/web-1: "))
