"""What `check` says of a text, for tests."""

from __future__ import annotations

from userspace_proxy.config.settings import Settings
from userspace_proxy.control.decode import ANNOTATION_PREFIX
from userspace_proxy.control.lint import Finding, LintOptions, lint
from userspace_proxy.modes import annotation_modes
from userspace_proxy.sources.documents import parse, split

OPTIONS = LintOptions(Settings().service_ranges, annotation_modes=annotation_modes(ANNOTATION_PREFIX))


def findings(text: str, options: LintOptions = OPTIONS) -> list[Finding]:
    manifests, problems = [], []
    for document in split("f", text):
        found, wrong = parse(document, for_check=True)
        manifests += found
        problems += wrong
    return lint(manifests, problems, options)


def faults(text: str, options: LintOptions = OPTIONS) -> list[Finding]:
    return [finding for finding in findings(text, options) if finding.severity == "fault"]
