"""New clients that arrive at a fixed rate, whether answers come or not: one after another, to every mode in turn."""

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

from userspace_proxy.compare.loads import REQUEST_AND_CLOSE
from userspace_proxy.compare.modes import ComparedMode
from userspace_proxy.compare.nodes import ModeNode
from userspace_proxy.errors import StartError
from userspace_proxy.lab import ask

RATE = 60.0  # new clients each second, for each mode
BUCKET_S = 0.1
_RECOVERED_WITHIN_S = 20.0


@dataclass
class Tally:
    """One mode's answers, by the bucket in which the request began.

    An answer after ``slow_s`` is slow. A client gives up after ``patience_s``.
    """

    addresses: Iterator[tuple[str, int]]
    length_s: float
    slow_s: float
    patience_s: float
    cut: int = 0  # of the failed ones, those that had been connected

    def __post_init__(self) -> None:
        self.good, self.slow, self.failed = ([0] * (int(self.length_s / BUCKET_S) + 1) for _ in range(3))


async def send_requests(tallies: Sequence[Tally], started_at: float, length_s: float) -> None:
    """Start clients at a fixed rate for *length_s*, each to the next mode; end when all of them have ended."""
    gap_s = 1 / (RATE * len(tallies))
    async with asyncio.TaskGroup() as clients:
        for number in range(int(length_s / gap_s)):
            due_s = number * gap_s
            await asyncio.sleep(started_at + due_s - time.monotonic())
            clients.create_task(
                _send_request(tallies[number % len(tallies)], started_at + due_s, int(due_s / BUCKET_S))
            )


async def _send_request(tally: Tally, due_at: float, bucket: int) -> None:
    answer, is_connected = b"", False
    with contextlib.suppress(OSError):
        async with asyncio.timeout(tally.patience_s):
            reader, writer = await asyncio.open_connection(*next(tally.addresses))
            is_connected = True
            try:
                writer.write(REQUEST_AND_CLOSE)
                answer = await reader.read(4096)
            finally:
                writer.transport.abort()
    is_slow = time.monotonic() - due_at > tally.slow_s
    is_good = answer.startswith(b"HTTP/1.1 200")
    ((tally.slow if is_slow else tally.good) if is_good else tally.failed)[bucket] += 1
    tally.cut += is_connected and not is_good


def wait_until_all_answer(mode: ComparedMode, node: ModeNode, addresses: Sequence[tuple[str, int]], pods: int) -> None:
    """Wait until all *pods* answer at *addresses*, through *mode*: an ejected pod could not fail.

    Raises:
        StartError: not all pods answer in time, so the event would show nothing.
    """
    give_up_at = time.monotonic() + _RECOVERED_WITHIN_S
    seen: set[str] = set()
    for ip, port in cycle(addresses):
        try:
            seen.add(ask(node.client, ip, port, timeout_s=0.5))
        except OSError:
            time.sleep(0.02)
        if len(seen) == pods:
            return
        if time.monotonic() > give_up_at:
            raise StartError(f"{mode.title}: of {pods} pods only {', '.join(sorted(seen)) or 'none'} answered")
