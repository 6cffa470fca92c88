"""The compose example on virtual hosts: backends that a DNS server names are added, die and hang, in two modes."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.net.world import POD1, POD2, Proxy, background_requests, wait_until
from userspace_proxy.lab import ServiceLab, ask

RELAY = Path(__file__).with_name("dns_relay.py")
PROJECT = Path(__file__).parents[2]
WEB = (PROJECT / "examples/compose/web.yaml").read_text()
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
    server = world.node.start(sys.executable, str(RELAY), str(one.addresses), "127.0.0.1")
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


# As Docker's DNS in a container: it knows the containers, and asks the container's own servers for other names.
DOCKERS_DNS = """
import socket, sys
import dns.message, dns.rrset
server, backends = sys.argv[1], sys.argv[2:]
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.bind(("127.0.0.11", 53))
    while True:
        received, client = sock.recvfrom(65_535)
        answer = dns.message.make_response(query := dns.message.from_wire(received))
        if str(query.question[0].name) == "web.":
            if query.question[0].rdtype == 1:
                answer.answer.append(dns.rrset.from_text("web.", 60, "IN", "A", *backends))
            sock.sendto(answer.to_wire(), client)
            continue
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.sendto(received, (server, 53))
            sock.sendto(other.recv(65_535), client)
"""


@pytest.mark.parametrize("mode", ["userspace", "nftables"])
def test_the_client_of_the_example_reaches_the_service_by_its_name(composed: Composed, mode: str) -> None:
    client, services = composed.world.client, yaml.safe_load((PROJECT / "docker-compose.yml").read_text())["services"]
    told = services["client"]
    resolv_conf = composed.folder / "client.conf"
    resolv_conf.write_text(f"nameserver 127.0.0.11\nsearch {told['dns_search'][0]}\noptions {told['dns_opt'][0]}\n")
    docker = client.start(sys.executable, "-c", DOCKERS_DNS, told["dns"][0], POD1, POD2)
    try:
        assert "--dns" in services["proxy"]["command"]
        composed.start("--proxy-mode", mode, "--dns")
        wait_until(lambda: composed.answering() == {"pod1", "pod2"}, "both backends answer")
        script = 'mount --bind "$0" /etc/resolv.conf && curl -s --max-time 5 --write-out " %{remote_ip}" http://web'
        answer = client.run("unshare", "--mount", "sh", "-c", script, str(resolv_conf)).stdout.split()
    finally:
        docker.kill()
        docker.wait(20)

    assert answer[0] in {"pod1", "pod2"}
    assert answer[1] == IP
