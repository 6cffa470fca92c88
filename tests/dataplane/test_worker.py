"""A worker in this process, and a control process that does not read."""

from __future__ import annotations

import asyncio
import socket

import pytest

from tests.dataplane.world import NAME, TCP_PORT, service_port
from tests.ends import until
from userspace_proxy.dataplane import wire, worker
from userspace_proxy.dataplane.channel import Channel
from userspace_proxy.dataplane.connections import Limits
from userspace_proxy.dataplane.groups import open_group
from userspace_proxy.dataplane.memory import Pin
from userspace_proxy.model.listeners import ListenerSpec
from userspace_proxy.model.names import L4Protocol


async def test_news_gather_in_the_pickers_while_the_control_process_does_not_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker, "_NEWS_PERIOD_S", 0)
    ours, theirs = socket.socketpair()
    running = worker.Worker(theirs, wire.WorkerSettings(Limits()))
    (listener,) = open_group(L4Protocol.TCP, TCP_PORT, 1, Limits())
    running._plane.serve(ListenerSpec(service_port(100), TCP_PORT), listener)
    memory = running._plane._shared[NAME].memory
    sending = asyncio.create_task(running._send_news())
    told: set[str] = set()
    try:
        for period in range(100):
            for client in range(1_000):
                memory.pin(f"10.{period}.{client >> 8}.{client & 255}", Pin(("10.0.0.1", 80), 100.0))
            for _ in range(3):
                await asyncio.sleep(0)
        assert len(running._channel._waiting) <= 1

        def note(body: bytes, _: list[int]) -> None:
            news = wire.answers.decode(body)
            assert isinstance(news, wire.News)
            told.update(client for _, its in news.memory for client, _ in its.pins)

        control = Channel(ours, note, lambda: None)
        await until(lambda: len(told) == 100_000, "the control process has all pins")
        control.close()
    finally:
        sending.cancel()
        running._channel.close()
        await running._plane.close(0)
