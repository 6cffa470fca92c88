"""The rules that are shown for one Service serve it when they are loaded."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.explain.shop import render
from userspace_proxy.lab import NODE_IP, Host, Lab, ServiceLab, ask, build_service_lab, start_nginx

WEB = ("-", "--service", "shop/web", "--cluster-cidr", "10.244.0.0/16", "--explain")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[ServiceLab]:
    with Lab() as lab:
        world = build_service_lab(lab, pods=2)
        world.node.set_knob("ipv4/ip_forward", 1)
        world.node.ip("route", "add", "10.96.0.0/16", "dev", "eth0")  # where nobody is: the kernel asks before OUTPUT
        for pod in world.pods:
            start_nginx(pod, tmp_path)
        yield world


def load(node: Host, text: str) -> None:
    if "table inet" in text:
        node.run("nft", "-f", "-", stdin=text)
        return
    parts = re.split(r"^# (ip6?tables-restore) --noflush$", text, flags=re.MULTILINE)
    for tool, part in zip(parts[1::2], parts[2::2], strict=True):
        node.run(tool, "--noflush", stdin=part)


def who_answers(world: ServiceLab) -> set[str]:
    dialled = ((world.client, "10.96.0.1", 80), (world.client, NODE_IP, 30_080), (world.node, "10.96.0.1", 80))
    return {ask(host, ip, port) for host, ip, port in dialled}


@pytest.mark.parametrize("mode", ["iptables", "nftables"])
def test_the_rules_shown_of_a_service_serve_it_with_affinity(mode: str, world: ServiceLab) -> None:
    load(world.node, render(*WEB, "--proxy-mode", mode).stdout)

    answers = [ask(world.client, "10.96.0.1") for _ in range(6)]

    assert len(set(answers)) == 1
    assert who_answers(world) <= {"pod1", "pod2"}


@pytest.mark.parametrize("rules", ["iptables", "nftables"])
def test_the_rules_shown_of_userspace_mode_lead_to_the_proxy_port(
    rules: str, world: ServiceLab, tmp_path: Path
) -> None:
    text = render(*WEB, "--rules", rules).stdout
    load(world.node, text)
    (port,) = set(re.findall(r"our proxy port (\d+)\.", text))
    (tmp_path / "index.html").write_text("the proxy")
    world.node.start(sys.executable, "-m", "http.server", port, "--directory", str(tmp_path), log=tmp_path / "log")
    give_up_at = time.monotonic() + 10
    while True:
        try:
            assert who_answers(world) == {"the proxy"}
        except OSError:
            assert time.monotonic() < give_up_at
            time.sleep(0.05)
        else:
            break

    with pytest.raises(ConnectionRefusedError):
        ask(world.client, NODE_IP, int(port))
