"""Tools and netlink requests in threads."""

from __future__ import annotations

import asyncio
import threading

import pytest

from userspace_proxy.host.tool import in_thread


async def test_cancellation_waits_for_the_running_tool() -> None:
    began, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def load() -> None:
        began.set()
        may_end.wait(5)
        ended.set()

    task = asyncio.create_task(in_thread(load))
    assert await asyncio.to_thread(began.wait, 5)
    task.cancel()
    await asyncio.wait({task}, timeout=0.05)
    assert not task.done()

    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
