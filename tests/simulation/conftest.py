from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest

from tests.simulation.install import use
from tests.simulation.kernel import Kernel
from tests.simulation.loop import SimulatedLoop


def _simulated_loop() -> asyncio.AbstractEventLoop:
    kernel = Kernel(seed=1)
    kernel.latency_s = 0.0  # as on loopback, which the contract is written for
    use(kernel)
    return SimulatedLoop(kernel)


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"simulated": _simulated_loop}
