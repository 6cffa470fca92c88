"""Processes killed and replaced under wrk, which opens a connection for each request: what clients see."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time

import pytest

from tests.net.world import Proxy, serve_web, wait_until
from userspace_proxy.lab import ServiceLab

CONNECTIONS = 32


class Load:
    """wrk from now until a second after what happens under it; ``failed`` and ``done`` count requests."""

    def __init__(self, world: ServiceLab) -> None:
        options = ["-t1", f"-c{CONNECTIONS}", "-d60s", "--timeout", "4s", "-H", "Connection: close"]
        command = world.client.command("wrk", *options, "http://10.96.4.1/")
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        time.sleep(1)

    def end(self) -> None:
        time.sleep(1)
        self._process.send_signal(signal.SIGINT)  # wrk says what it has counted so far
        out = self._process.communicate(timeout=20)[0]
        self.done = int(re.findall(r"(\d+) requests in", out)[0])
        errors = re.findall(r"connect (\d+), read (\d+), write (\d+), timeout (\d+)", out)
        refused = re.findall(r"Non-2xx or 3xx responses: (\d+)", out)
        self.failed = sum(map(int, errors[0])) if errors else 0
        self.failed += int(refused[0]) if refused else 0
        assert self.done > 10 * CONNECTIONS, out


@pytest.fixture
def quiet_proxy(fresh_proxy: Proxy) -> Proxy:
    """Without the log lines and the access log, a line for each of these many connections."""
    fresh_proxy.verbose = False
    serve_web(fresh_proxy)
    fresh_proxy.start()
    return fresh_proxy


def test_a_control_process_that_is_killed_fails_no_request(quiet_proxy: Proxy, world: ServiceLab) -> None:
    load = Load(world)
    quiet_proxy.stop(signal.SIGKILL)
    quiet_proxy.start()
    load.end()

    assert load.failed == 0


def test_a_worker_that_is_killed_fails_those_in_its_hands_alone(quiet_proxy: Proxy, world: ServiceLab) -> None:
    load = Load(world)
    os.kill(quiet_proxy.workers()[0], signal.SIGKILL)
    load.end()

    assert load.failed <= CONNECTIONS


def test_a_hand_over_fails_no_request(quiet_proxy: Proxy, world: ServiceLab) -> None:
    first = quiet_proxy.process
    assert first is not None
    load = Load(world)
    quiet_proxy.start()
    load.end()

    assert load.failed == 0
    assert first.wait(20) == 0


def test_an_upgrade_in_place_fails_no_request(quiet_proxy: Proxy, world: ServiceLab) -> None:
    load = Load(world)
    assert quiet_proxy.process is not None
    quiet_proxy.process.send_signal(signal.SIGUSR2)
    wait_until(lambda: quiet_proxy.log().count("ready:") == 2, "it is ready again")
    load.end()

    assert load.failed == 0
