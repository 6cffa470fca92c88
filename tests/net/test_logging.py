"""Logs that cannot be written cost lines, never traffic."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess

from tests.net.world import POD1, POD2, Proxy, answers, documents, endpoints, serve_web, service, wait_until
from userspace_proxy.lab import ServiceLab

WEB, OTHER = "10.96.4.1", "10.96.4.3"


def test_a_blocked_stderr_stops_neither_traffic_nor_changes_nor_the_end(fresh_proxy: Proxy, world: ServiceLab) -> None:
    reader, writer = os.pipe()
    serve_web(fresh_proxy)
    fresh_proxy.verbose = False
    command = fresh_proxy.command(*fresh_proxy.run_arguments(), "--verbose")
    try:
        fresh_proxy.process = subprocess.Popen(world.node.command(*command), stderr=writer)
        world.node.processes.append(fresh_proxy.process)
        wait_until(lambda: answers(world.client, WEB, 80), "it serves")
        _fill(writer)

        # A line of the worker's for each connection, and more for an endpoint that refuses.
        fresh_proxy.apply("web", documents(service("web", WEB), endpoints("web", POD1, POD2, "10.244.0.1")))
        wait_until(lambda: fresh_proxy.metric("userspace_proxy_endpoint_dial_failures_total") > 0 or not answers(
            world.client, WEB, 80), "an endpoint refuses")  # fmt: skip
        assert all(answers(world.client, WEB, 80) for _ in range(20))
        # The control process says what is new.
        fresh_proxy.serve("other", OTHER, POD1)
        assert answers(world.client, OTHER, 80)
        assert fresh_proxy.get("/healthz", 10256)[0] == 200

        assert fresh_proxy.stop(signal.SIGTERM) == 0
    finally:
        os.close(writer)
        os.close(reader)


def _fill(writer: int) -> None:
    """Write to a pipe until it takes no more; only our own description of it does not wait."""
    own = os.open(f"/proc/self/fd/{writer}", os.O_WRONLY | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(own, b"." * 4096)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(own, b".")
    os.close(own)
