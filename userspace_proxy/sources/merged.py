"""Runs several async generators at once."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import TypeVar

T = TypeVar("T")


@contextlib.asynccontextmanager
async def merged(
    generators: Mapping[str, AsyncIterator[T]],
) -> AsyncGenerator[Callable[[float | None], Awaitable[T | None]]]:
    """Run *generators* as tasks of these names; return a function that waits for their next item, in order of arrival.

    The function returns None after the given seconds; it raises the exception that ended a generator.
    """
    arrived: asyncio.Queue[T | Exception] = asyncio.Queue()

    async def follow(generator: AsyncIterator[T]) -> None:
        try:
            async for item in generator:
                arrived.put_nowait(item)
        except Exception as error:  # noqa: BLE001 - raised where the next item is awaited
            arrived.put_nowait(error)

    async def next_item(timeout_s: float | None) -> T | None:
        try:
            async with asyncio.timeout(timeout_s):
                item = await arrived.get()
        except TimeoutError:
            return None
        if isinstance(item, Exception):
            raise item
        return item

    tasks = [asyncio.create_task(follow(generator), name=name) for name, generator in generators.items()]
    try:
        yield next_item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
