"""Long work in the data plane's event loop, in slices that are bounded in time."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TypeVar

# A packet waits at most about this long for work that concerns many listeners or connections.
SLICE_S = 0.002

Item = TypeVar("Item")


async def in_slices(items: Iterable[Item], now: Callable[[], float]) -> AsyncIterator[Item]:
    """Yield *items*. Let the event loop handle packets whenever SLICE_S have passed since it last could.

    One item is never divided.
    """
    began = now()
    for item in items:
        yield item
        if now() - began >= SLICE_S:
            await asyncio.sleep(0)
            began = now()
