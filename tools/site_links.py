"""A hook of mkdocs: put the lessons and the pages of the root folder into the site, and follow links to them.

Pages are written for a reader of the repository, so links lead out of docs/. In the site, docs/ is the root, and
everything else keeps its path.
"""

from __future__ import annotations

import posixpath
import re
import subprocess
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
# The site has a front page of its own.
_OVERVIEW = {"README.md": "overview.md"}
_LINK = re.compile(r"(\]\(|^\[[^\]]+\]: )([^)\s#]+)", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to outside of docs/."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.md", "LICENSE", "examples"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if not name.startswith("docs/") and (ROOT / name).exists():
            files.append(File.generated(config, _site_path(name), abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return *markdown* with links that lead to the same files in the site."""
    here = page.file.src_uri
    in_repository = {site: name for name, site in _OVERVIEW.items()}.get(here) or (
        here if (ROOT / here).exists() and not (ROOT / "docs" / here).exists() else f"docs/{here}"
    )

    def moved(found: re.Match[str]) -> str:
        target = found[2]
        if re.match(r"[a-z]+:", target):
            return found[0]
        name = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository), target))
        if (ROOT / name).is_dir():
            name = f"{name}/README.md"
        return found[1] + posixpath.relpath(_site_path(name), posixpath.dirname(here) or ".")

    return _LINK.sub(moved, markdown)


def _site_path(name: str) -> str:
    return _OVERVIEW.get(name, name.removeprefix("docs/"))
