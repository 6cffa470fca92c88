"""The bounds of manifests that docs/reference/limits.md states are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

from userspace_proxy.sources import paths, yaml_values

LIMITS = Path(__file__).parents[2] / "docs" / "reference" / "limits.md"
MB = 1024**2


def test_the_bounds_of_manifests_are_those_that_are_documented() -> None:
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", LIMITS.read_text(), re.MULTILINE)[1:]

    assert [re.findall(r"[\d,]+", value.replace(",", "")) for _, value in rows] == [
        [str(paths._SIZE_MAX_BYTES // MB)],
        [str(paths._DOCUMENTS_MAX)],
        [str(yaml_values._SIZE_MAX // MB)],
        [str(yaml_values.DEPTH_MAX)],
        [str(yaml_values._REPEATED_RATIO), str(yaml_values._REPEATED_MAX // MB)],
        [str(yaml_values._DIRECTIVES_MAX)],
    ]
