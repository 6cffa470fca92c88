"""Mutants that no test can find, because they behave as the original does, each with the reason.

By module, function and change: see `mutation.Mutant.place`. A survivor that is not here is a gap in the tests.
"""

from __future__ import annotations

EQUIVALENT: dict[tuple[str, str, str], str] = {}
