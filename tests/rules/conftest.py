"""A host of its own for rules that are loaded for real."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from userspace_proxy.lab import Host, Lab


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


@pytest.fixture(scope="module")
def host(lab: Lab) -> Host:
    return lab.add("rules")
