"""Helpers of a lab: waiting for a condition, and the manifest of a Service."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from userspace_proxy.config.settings import Settings
from userspace_proxy.control.lint import LintOptions, lint
from userspace_proxy.errors import StartError
from userspace_proxy.lab import service, wait_until
from userspace_proxy.sources.files import read_once


def test_an_oserror_counts_as_not_yet() -> None:
    answers: Iterator[OSError | int] = iter([ConnectionRefusedError("refused"), 0, 1])

    def condition() -> int:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    assert wait_until(condition, "the server is not up", poll_s=0) >= 0


def test_a_process_that_ends_is_reported_with_the_last_line_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("starting\nuserspace-proxy: port 80 is in use\n")

    with subprocess.Popen(["true"]) as process, pytest.raises(StartError) as error:
        wait_until(lambda: False, "it did not start", process=process, log=log)

    assert str(error.value) == "it did not start: port 80 is in use"


def test_a_timeout_is_reported_with_the_last_error() -> None:
    def refuse() -> bool:
        raise ConnectionRefusedError("connection refused")

    with pytest.raises(StartError, match="it does not answer: connection refused"):
        wait_until(refuse, "it does not answer", timeout_s=0)


def test_the_manifest_of_a_service_has_no_mistakes(tmp_path: Path) -> None:
    manifest = tmp_path / "web.yaml"
    sticky = service("sticky", "10.96.0.11", ["10.244.0.2"], options="sessionAffinity: ClientIP")
    manifest.write_text(service("web", "10.96.0.10", ["10.244.0.2", "10.244.0.3"]) + sticky)

    manifests, problems = read_once([str(manifest)])

    assert [each.kind for each in manifests] == ["Service", "EndpointSlice"] * 2
    assert lint(manifests, problems, LintOptions(Settings().service_ranges)) == []
