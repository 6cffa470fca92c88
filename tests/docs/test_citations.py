"""Citations in code and documentation resolve: statements about kube-proxy, and files of this repository."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BEHAVIOURS = ROOT / "docs" / "reference" / "kube-proxy-behaviours.md"
# "behaviours U1", "behaviours U1 to U4", "behaviours M3, P4".
CITED = re.compile(r"behaviours ([A-Z]\d+[a-z]?(?:(?:,| and| to) [A-Z]\d+[a-z]?)*)")
FILES = re.compile(
    r"(?<![\w/.*-])((?:docs|tests|tools|benchmarks|examples|userspace_proxy)/[\w/.-]+\.(?:py|md|toml|sh|svg|json))\b"
)
# In pages about the code, files below userspace_proxy/: such as `dataplane/dial.py`.
MODULES = re.compile(r"`((?:[a-z_]+/)+[a-z_]+\.py)`")
ABOUT_CODE = ("docs/decisions", "docs/explanation/architecture.md")


def texts() -> list[Path]:
    """Return the files in git that are written by hand."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [
        ROOT / name
        for name in listed.stdout.splitlines()
        if name.endswith((".py", ".md", ".toml")) and (ROOT / name).exists()
    ]


@pytest.fixture(scope="module")
def contents() -> dict[Path, str]:
    return {path.relative_to(ROOT): path.read_text() for path in texts()}


def test_each_cited_behaviour_of_kube_proxy_is_written_down(contents: dict[Path, str]) -> None:
    known = set(re.findall(r"^- \*\*([A-Z]\d+[a-z]?)\*\*", BEHAVIOURS.read_text(), flags=re.MULTILINE))
    cited = {
        (str(path), number)
        for path, text in contents.items()
        for group in CITED.findall(text)
        for number in re.findall(r"[A-Z]\d+[a-z]?", group)
    }

    assert cited
    assert {each for each in cited if each[1] not in known} == set()


def test_each_cited_file_of_the_repository_exists(contents: dict[Path, str]) -> None:
    cited = {(str(path), name) for path, text in contents.items() for name in FILES.findall(text)}

    assert {each for each in cited if not (ROOT / each[1]).exists()} == set()


def test_each_module_that_a_page_about_the_code_names_exists(contents: dict[Path, str]) -> None:
    cited = {
        (str(path), name)
        for path, text in contents.items()
        if str(path).startswith(ABOUT_CODE)
        for name in MODULES.findall(text)
    }

    assert cited
    missing = {
        each for each in cited if not (ROOT / "userspace_proxy" / each[1]).exists() and not (ROOT / each[1]).exists()
    }
    assert missing == set()
