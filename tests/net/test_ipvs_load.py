"""`--proxy-mode ipvs` under a steady load, on a kernel that has IPVS: whatever becomes of us, no client notices."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.net.ipvs import IpvsProxy, fresh_ipvs_proxy
from tests.net.world import POD1, POD2, background_requests, is_refused, traces, wait_until
from userspace_proxy.lab import HTTP_PORT, ServiceLab, ask, connect

pytestmark = pytest.mark.ipvs

IP = "10.96.9.40"
# Paced: the kernel loses a SYN now and then whose port it knows, and nginx ends a connection after 1,000 requests.
PAUSE_S = 0.1
CHANGES = 20


@pytest.fixture
def proxy(world: ServiceLab, tmp_path: Path) -> Iterator[IpvsProxy]:
    with fresh_ipvs_proxy(world, tmp_path) as one:
        one.verbose = False
        yield one


def wait_for_more(outcomes: Sequence[object], count: int) -> None:
    so_far = len(outcomes)
    wait_until(lambda: len(outcomes) >= so_far + count, "more is asked")


def test_under_load_no_request_fails_and_nothing_is_left_at_the_end(proxy: IpvsProxy, world: ServiceLab) -> None:
    before = traces(world.node)
    kept = http.client.HTTPConnection(IP)

    def ask_anew() -> str:
        time.sleep(PAUSE_S)
        return ask(world.client, IP)

    def ask_on() -> str:
        time.sleep(PAUSE_S)
        kept.request("GET", "/")
        return kept.getresponse().read().decode().strip()

    def change_often(outcomes: Sequence[object], *last: str) -> None:
        for pods in itertools.islice(itertools.cycle(((POD1, POD2), (POD2,), (POD2, POD1), (POD1,))), CHANGES // 2 - 1):
            proxy.give("web", IP, *pods)
            wait_for_more(outcomes, 1)
        proxy.give("web", IP, *last)
        leads = [f"-a -t {IP}:80 -r {pod}:{HTTP_PORT} -m -w 1" for pod in last]
        wait_until(
            lambda: [s for s in proxy.servers().splitlines() if f"-t {IP}:80 -r" in s and "-w 1" in s] == leads,
            "the last change is in force",
        )

    proxy.give("web", IP, POD1)
    proxy.start()
    with contextlib.closing(kept):
        kept.sock = connect(world.client, IP, 80)
        with background_requests(ask_on) as asked_on:
            with background_requests(ask_anew) as asked_anew:
                change_often(asked_anew, POD2)
                proxy.stop(signal.SIGKILL)
                proxy.start()
                change_often(asked_anew, POD1)
                assert proxy.process is not None
                proxy.process.send_signal(signal.SIGUSR2)
                wait_until(lambda: proxy.log().count("ready:") == 2, "it is started anew in its place", 20)
            proxy.process.send_signal(signal.SIGINT)
            wait_until(lambda: is_refused(world.client, IP, 80), "who is new is refused")
            wait_for_more(asked_on, 4)
    assert proxy.stop() == 0, proxy.log()

    for outcomes in (asked_on, asked_anew):
        assert set(outcomes) <= {"pod1", "pod2"}
        assert len(outcomes) > 2 * CHANGES
    assert proxy.servers() == ""
    assert "kube-ipvs0" not in world.node.ip("link", "show")
    assert traces(world.node) == before
