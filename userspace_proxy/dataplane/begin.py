"""How a child process begins: its arguments, its log, its collector and its event loop."""

import asyncio
import gc
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from typing import NoReturn, TypeVar

import msgspec

from userspace_proxy.logs import configure_logging, flush_log

# Ended connections leave no reference cycles, so collections find nothing unless there is a bug. A full collection
# would stop all packets, for 50 ms with 10,000 Services. The first number: allocations between two collections.
_GC_THRESHOLDS = (100_000, 20, 100)


class ChildSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of a child process. ``orphan_timeout_s``: how long it serves without a control process."""

    orphan_timeout_s: float = 0.0
    loop: str = "uvloop"
    log_format: str = "text"
    verbose: bool = False


S = TypeVar("S", bound=ChildSettings)


def begin(settings_type: type[S], serve: Callable[[socket.socket, S], Awaitable[None]]) -> NoReturn:
    """Run *serve* with the socket and the settings that `ChildProcess` passes, and end this process."""
    descriptor, settings_json = sys.argv[1:]
    settings = msgspec.json.decode(settings_json, type=settings_type)
    configure_logging(settings.log_format, verbose=settings.verbose)
    factory = None
    if settings.loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)

    async def run() -> None:
        await serve(socket.socket(fileno=int(descriptor)), settings)

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(run())
    flush_log()
    os._exit(0)  # Python would take all objects apart first
