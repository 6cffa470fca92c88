from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.dataplane import world


@pytest.fixture(scope="package", autouse=True)
def surroundings() -> Iterator[None]:
    with world.surroundings():
        yield
