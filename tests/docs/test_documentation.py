"""Pages can be read anywhere: lines are short, links lead somewhere, and generated pages are in step with the code."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tools.flags import page as flags_page
from userspace_proxy.control.decode.annotations import ANNOTATIONS
from userspace_proxy.model.service import IPVS_SCHEDULERS, WEIGHT_MAX, Balance, SourceIP

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"
LINE_MAX = 120
# Inline links and images, link definitions, and addresses in HTML.
LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)$|(?:src|href)=\"([^\"]+)\"", re.MULTILINE)
# Still to be wrapped.
LONG = {"docs/explanation/architecture.md"}


def pages() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


@cache
def prose(page: Path) -> str:
    """Return *page* without its code blocks, in which nothing is a link or a heading."""
    return re.sub(r"^( *)```.*?^\1```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def headings(page: Path) -> set[str]:
    """Return the anchors of *page*: each heading in lower case, without punctuation, hyphens for spaces."""
    found = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in found}


def broken_links(page: Path) -> Iterator[str]:
    for found in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page))):
        target, _, anchor = "".join(found).partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / target).resolve() if target else page
        if not file.exists() or (anchor and anchor not in headings(file)):
            yield "".join(found)


@pytest.mark.parametrize("name", pages())
def test_every_link_leads_to_a_file_and_a_heading_of_it(name: str) -> None:
    assert list(broken_links(ROOT / name)) == []


@pytest.mark.parametrize("name", sorted(set(pages()) - LONG))
def test_no_line_is_longer_than_a_window(name: str) -> None:
    lines = (ROOT / name).read_text().splitlines()

    assert [number for number, line in enumerate(lines, 1) if len(line) > LINE_MAX] == []


def test_the_page_of_flags_is_what_the_command_line_takes() -> None:
    assert (REFERENCE / "flags.md").read_text() == flags_page(), "make reference"


def test_the_page_of_annotations_has_each_of_ours_and_its_values() -> None:
    page = prose(REFERENCE / "annotations.md")

    assert set(re.findall(r"^## `(.*)`$", page, re.MULTILINE)) == set(ANNOTATIONS)
    for value in (*SourceIP, *Balance, *IPVS_SCHEDULERS):
        assert f"`{value}`" in page
    assert f"from 0 to {WEIGHT_MAX}" in page


def test_the_index_and_the_navigation_of_the_site_name_every_page() -> None:
    index, site = (ROOT / "docs" / "README.md").read_text(), (ROOT / "mkdocs.yml").read_text()
    decisions = (ROOT / "docs" / "decisions" / "README.md").read_text()

    for name in pages():
        folder, _, page = name.removeprefix("docs/").partition("/")
        if name.startswith("docs/") and page and page != "README.md":
            assert f"({page})" in decisions if folder == "decisions" else f"({folder}/{page})" in index, name
            assert folder == "decisions" or f"{folder}/{page}\n" in site, name
