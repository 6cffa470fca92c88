"""The compose example on virtual hosts: backends that a DNS server names are added, die and hang, in two modes."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.net.world import POD1, POD2, Proxy, background_requests, wait_until
from userspace_proxy.lab import ServiceLab, ask

RELAY = Path(__file__).with_name("dns_relay.py")
WEB = (Path(__file__).parents[2] / "examples/compose/web.yaml").read_text()
IP = "10.96.0.20"
POD3 = ServiceLab.pod_ip(2)


class Composed(Proxy):
    """The proxy on a node whose resolver is a server of ours, as in a container."""

    def __init__(self, world: ServiceLab, folder: Path) -> None:
        super().__init__(world, folder)
        self.addresses = folder / "addresses"
        self.resolv_conf = folder / "resolv.conf"
        self.resolv_conf.write_text("nameserver 127.0.0.1\n")
        self.apply("web", WEB)

    def command(self, *arguments: str) -> list[str]:
        script = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'
        return ["unshare", "--mount", "sh", "-c", script, str(self.resolv_conf), *super().command(*arguments)]

    def name(self, *addresses: str) -> None:
        """Have the name of the backends stand for *addresses*."""
        new = self.addresses.with_suffix(".new")
        new.write_text("\n".join(addresses))
        new.replace(self.addresses)

    def answering(self) -> set[str]:
        return {ask(self.world.client, IP) for _ in range(12)}


@pytest.fixture
def composed(world: ServiceLab, tmp_path: Path) -> Iterator[Composed]:
    one = Composed(world, tmp_path)
    one.name(POD1, POD2)
    server = world.node.start(sys.executable, str(RELAY), str(one.addresses))
    wait_until(lambda: ":53 " in world.node.run("ss", "-lnu").stdout, "the DNS server serves")
    yield one
    one.end()
    server.kill()
    server.wait(20)


@pytest.mark.parametrize("mode", ["userspace", "nftables"])
def test_endpoints_follow_the_name_and_stay_while_it_cannot_be_asked_for(composed: Composed, mode: str) -> None:
    composed.start("--proxy-mode", mode)
    wait_until(lambda: composed.answering() == {"pod1", "pod2"}, "both backends answer")

    composed.name(POD1, POD2, POD3)
    wait_until(lambda: composed.answering() == {"pod1", "pod2", "pod3"}, "the third backend answers")
    with background_requests(lambda: ask(composed.world.client, IP)) as outcomes:
        composed.name(POD2, POD3)
        composed.wait_logged(f"removed {POD1}:8080")
    assert set(outcomes) <= {"pod1", "pod2", "pod3"}
    assert composed.answering() <= {"pod2", "pod3"}

    composed.resolv_conf.write_text("nameserver 127.0.0.99\n")
    composed.wait_logged("dns://web gives no addresses: the DNS server 127.0.0.99 does not answer; its last 2 stay")
    assert "dns://web gives no addresses" in composed.get("/healthz", 10256)[1]
    assert composed.metric("userspace_proxy_object_problems") == 1
    assert composed.answering() <= {"pod2", "pod3"}
    assert composed.process is not None
    composed.process.send_signal(signal.SIGINT)  # which removes the rules in every mode
    assert composed.process.wait(20) == 0
