"""A node of a mode, with nothing on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from userspace_proxy.compare.sites import Site
from userspace_proxy.lab import Lab


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A site whose node is linked to nothing; what runs there ends with the test."""
    with Lab() as lab:
        yield Site("bare", lab.add("node"), lab.add("client"), 1, tmp_path, front_ip="127.0.0.1")
