"""Modes as a set: each is one folder and one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.net.contract.conftest import VARIANTS
from userspace_proxy import modes
from userspace_proxy.modes import MODES

FOLDER = Path(modes.__file__).parent
README_LINES_MAX = 60


@pytest.mark.parametrize("name", MODES)
def test_each_mode_has_a_folder_of_its_name_with_a_page_for_learners(name: str) -> None:
    assert MODES[name].name == name
    assert (FOLDER / name / "mode.py").exists()
    assert len((FOLDER / name / "README.md").read_text().splitlines()) <= README_LINES_MAX


def test_every_folder_with_a_mode_is_registered() -> None:
    assert {file.parent.name for file in FOLDER.glob("*/mode.py")} == set(MODES)


def test_every_mode_is_held_to_the_contract_table() -> None:
    assert {variant.mode for variant in VARIANTS} == set(MODES)


def test_listing_modes_imports_no_code_of_theirs() -> None:
    code = (
        "import sys, userspace_proxy.modes; print(*sorted(m for m in sys.modules if 'proxier' in m or 'loader' in m))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert [name for name in done.stdout.split() if name.startswith("userspace_proxy")] == []
