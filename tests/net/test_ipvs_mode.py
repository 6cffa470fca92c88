"""`--proxy-mode ipvs` as a whole process, on a kernel that has IPVS: what `ipvsadm` shows, and what clients see."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.modes.redirect_cases import name
from tests.modes.translation_cases import HERE, NEAR4, PODS, by_name, translation
from tests.net.ipvs import IpvsProxy, fresh_ipvs_proxy
from tests.net.world import POD1, POD2, Proxy, answers, ask_udp, documents, endpoints, is_refused, service, wait_until
from userspace_proxy.lab import NODE_IP, Host, ServiceLab, connect
from userspace_proxy.model.service import ServicePort
from userspace_proxy.modes.ipvs.device import VirtualDevice, device_lines
from userspace_proxy.modes.ipvs.loader import IpvsTables
from userspace_proxy.modes.kernel_rules import NodeFacts, RuleUpdate

pytestmark = pytest.mark.ipvs

FACTS = NodeFacts(HERE, PODS)


STRICT_ARP = ("ipv4/conf/all/arp_ignore", "ipv4/conf/all/arp_announce")


@pytest.fixture
def proxy(world: ServiceLab, tmp_path: Path) -> Iterator[IpvsProxy]:
    with fresh_ipvs_proxy(world, tmp_path) as one:
        yield one


def test_clients_are_served_by_the_kernel_and_changes_are_followed(proxy: IpvsProxy, world: ServiceLab) -> None:
    proxy.give("web", "10.96.9.2", POD1)
    proxy.start()
    for client in (world.client, world.node):
        assert answers(client, "10.96.9.2", 80) == "pod1"
        assert ask_udp(client, "10.96.9.2") == "pod1"

    proxy.give("web", "10.96.9.2", POD2)
    wait_until(lambda: answers(world.client, "10.96.9.2", 80) == "pod2", "pod2 answers")

    proxy.give("web", "10.96.9.2")
    wait_until(lambda: is_refused(world.client, "10.96.9.2", 80), "nobody is there")
    proxy.delete("web")
    wait_until(lambda: "10.96.9.2" not in world.node.ip("address", "show"), "its address is gone")


def test_ipvsadm_shows_what_tutorials_show(proxy: IpvsProxy, world: ServiceLab) -> None:
    proxy.give("web", "10.96.9.1", POD1, POD2)
    proxy.start()

    assert proxy.servers().splitlines()[:3] == [
        "-A -t 10.96.9.1:80 -s rr -b flag-3",
        f"-a -t 10.96.9.1:80 -r {POD1}:8080 -m -w 1",
        f"-a -t 10.96.9.1:80 -r {POD2}:8080 -m -w 1",
    ]
    assert "10.96.9.1/32" in world.node.ip("address", "show", "dev", "kube-ipvs0")
    assert Counter(answers(world.client, "10.96.9.1", 80) for _ in range(10)) == {"pod1": 5, "pod2": 5}


def test_affinity_lasts_its_time_out_and_pins_trigger_no_repair(proxy: IpvsProxy, world: ServiceLab) -> None:
    proxy.give("web", "10.96.9.12", POD1, POD2, extra="  sessionAffinity: ClientIP")
    proxy.start()

    assert len({answers(world.client, "10.96.9.12", 80) for _ in range(6)}) == 1
    assert "-A -t 10.96.9.12:80 -s rr -p 10800 -b flag-3" in proxy.servers()
    # It is looked at once a second, and once after each load.
    proxy.give("more", "10.96.9.13", POD1)
    wait_until(lambda: answers(world.client, "10.96.9.13", 80) == "pod1", "the next load is in force")
    assert "changed by another program" not in proxy.log()


def test_an_open_connection_stays_with_an_endpoint_that_leaves_and_others_go_elsewhere(
    proxy: IpvsProxy, world: ServiceLab
) -> None:
    proxy.give("web", "10.96.9.3", POD1)
    proxy.start()
    with connect(world.client, "10.96.9.3", 80) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b"pod1" in sock.recv(1 << 16)
        proxy.give("web", "10.96.9.3", POD2)
        wait_until(lambda: answers(world.client, "10.96.9.3", 80) == "pod2", "pod2 answers")

        assert f"-r {POD1}:8080 -m -w 0" in proxy.servers()
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert b"pod1" in sock.recv(1 << 16)


def test_a_udp_flow_finds_another_endpoint_when_its_own_is_gone(proxy: IpvsProxy, world: ServiceLab) -> None:
    proxy.give("web", "10.96.9.4", POD1)
    proxy.start()
    with connect(world.client, "10.96.9.4", 53, kind=socket.SOCK_DGRAM) as sock:
        sock.settimeout(0.5)

        def who() -> str:
            sock.send(b"who")
            try:
                return sock.recv(1 << 16).decode()
            except TimeoutError:
                return ""

        wait_until(lambda: who() == "pod1", "pod1 answers")
        proxy.give("web", "10.96.9.4", POD2)
        wait_until(lambda: who() == "pod2", "the same flow is answered by pod2")


def test_strict_arp_answers_only_for_addresses_of_the_interface(proxy: IpvsProxy, world: ServiceLab) -> None:
    """An external IP in the client's own network is another host's; borne by the node it would be the node's, too."""
    manifest = documents(service("web", "10.96.9.13", extra="  externalIPs: [192.168.50.99]"), endpoints("web", POD1))
    proxy.apply("web", manifest)
    try:
        proxy.start("--ipvs-strict-arp")
    finally:
        held = [world.node.run("cat", f"/proc/sys/net/{knob}").stdout.strip() for knob in STRICT_ARP]
        was_answered = answers(world.client, "192.168.50.99", 80)
        for knob in STRICT_ARP:
            world.node.set_knob(knob, 0)  # the node is other tests', too

    assert held == ["1", "2"]
    assert was_answered == ""
    world.client.ip("neigh", "flush", "all")
    assert answers(world.client, "192.168.50.99", 80) == "pod1"


def test_schedulers_and_weights_are_those_of_the_annotations(proxy: IpvsProxy, world: ServiceLab) -> None:
    manifest = documents(service("web", "10.96.9.5"), endpoints("web", POD1, POD2))
    said = f'{{userspace-proxy/ipvs-scheduler: wrr, userspace-proxy/weights: "{POD1}=3"}}'
    proxy.apply("web", manifest.replace("metadata: {name: web}", f"metadata: {{name: web, annotations: {said}}}"))
    proxy.start()

    assert "-A -t 10.96.9.5:80 -s wrr -b flag-3" in proxy.servers()
    assert Counter(answers(world.client, "10.96.9.5", 80) for _ in range(12)) == {"pod1": 9, "pod2": 3}


def test_clients_that_source_hashing_leads_to_an_endpoint_with_weight_0_get_another_one(
    proxy: IpvsProxy, world: ServiceLab
) -> None:
    """An endpoint that leaves has weight 0 until its last connection ends."""
    manifest = documents(service("web", "10.96.9.26"), endpoints("web", POD1, POD2))
    said = f'{{userspace-proxy/ipvs-scheduler: sh, userspace-proxy/weights: "{POD1}=0"}}'
    proxy.apply("web", manifest.replace("metadata: {name: web}", f"metadata: {{name: web, annotations: {said}}}"))
    proxy.start()
    clients = [f"192.168.50.{number}" for number in range(101, 117)]
    for ip in clients:
        world.client.ip("address", "add", f"{ip}/24", "dev", "eth0")
    try:
        for ip in clients:
            with world.client.inside():
                sock = socket.create_connection(("10.96.9.26", 80), timeout=10, source_address=(ip, 0))
            with sock:
                sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
                assert b"pod2" in sock.recv(1 << 16)
    finally:
        for ip in clients:
            world.client.ip("address", "del", f"{ip}/24", "dev", "eth0")


def test_schedulers_that_this_kernel_lacks_are_replaced(proxy: IpvsProxy, world: ServiceLab) -> None:
    proxy.give("web", "10.96.9.25", POD1)
    proxy.start("--ipvs-scheduler", "twos")

    assert "-A -t 10.96.9.25:80 -s rr -b flag-3" in proxy.servers()
    proxy.wait_logged("this kernel has no scheduler twos; using rr instead")
    assert answers(world.client, "10.96.9.25", 80) == "pod1"


def test_node_ports_are_at_every_address_of_the_node_also_at_one_that_comes_later(
    proxy: IpvsProxy, world: ServiceLab
) -> None:
    ports = "[{name: http, port: 80, nodePort: 30080}, {name: dns, port: 53, protocol: UDP, nodePort: 30053}]"
    node_port = service("web", "10.96.9.12", ports=ports, extra="  type: NodePort")
    proxy.apply("web", documents(node_port, endpoints("web", POD1)))
    proxy.start()
    assert answers(world.client, "192.168.50.1", 30080) == ask_udp(world.client, "192.168.50.1", 30053) == "pod1"

    world.node.ip("address", "add", "192.168.77.1/32", "dev", "eth0")

    wait_until(lambda: answers(world.client, "192.168.77.1", 30080) == "pod1", "it is served there, too")
    world.node.ip("address", "del", "192.168.77.1/32", "dev", "eth0")
    wait_until(lambda: "192.168.77.1" not in proxy.servers(), "it is not looked for there any more")


def test_objects_removed_by_another_program_are_restored(proxy: IpvsProxy, world: ServiceLab) -> None:
    proxy.give("web", "10.96.9.6", POD1)
    proxy.start()
    for command in (("ipvsadm", "-C"), ("ip", "link", "del", "kube-ipvs0"), ("nft", "flush", "ruleset")):
        world.node.run(*command)

        wait_until(lambda: answers(world.client, "10.96.9.6", 80) == "pod1", f"it is served again after {command}")
        wait_until(lambda: "inet userspace_proxy_ipvs" in world.node.run("nft", "list", "tables").stdout, "all of it")


def test_foreign_virtual_servers_stay_and_a_conflicting_one_is_named(proxy: IpvsProxy, world: ServiceLab) -> None:
    theirs = (
        "-A -t 10.96.9.7:80 -s rr\n-A -t 10.96.9.23:80 -s rr\n-A -t 192.168.50.1:9999 -s wlc\n"
        "-A --sctp-service 192.168.50.1:9998 -s rr -b flag-3\n-A -f 7 -s rr -b flag-3\n"
    )
    world.node.run("ipvsadm", "-R", stdin=theirs)
    proxy.give("web", "10.96.9.7", POD1)
    proxy.start()

    proxy.wait_logged("10.96.9.7:80 is not served: another program has a virtual server there")
    assert ask_udp(world.client, "10.96.9.7") == "pod1"
    proxy.give("late", "10.96.9.23", POD1)
    wait_until(lambda: "10.96.9.23:80 is not served" in proxy.log(), "who comes to want one is named, too")
    assert proxy.stop() == 0
    assert sorted(proxy.servers().splitlines()) == sorted(theirs.splitlines())
    world.node.run("ipvsadm", "-C")


def test_a_foreign_virtual_server_stays_and_ours_takes_its_place_when_it_goes(
    proxy: IpvsProxy, world: ServiceLab
) -> None:
    proxy.give("other", "10.96.9.15", POD1)
    proxy.start()
    world.node.run("ipvsadm", "-A", "-t", "10.96.9.16:80", "-s", "wlc")

    proxy.give("web", "10.96.9.16", POD1)
    wait_until(lambda: "10.96.9.16:80 is not served" in proxy.log(), "it is named")
    assert [line for line in proxy.servers().splitlines() if "-t 10.96.9.16:80" in line] == [
        "-A -t 10.96.9.16:80 -s wlc"
    ]

    world.node.run("ipvsadm", "-D", "-t", "10.96.9.16:80")
    wait_until(lambda: answers(world.client, "10.96.9.16", 80) == "pod1", "ours is there")


def test_addresses_that_this_node_gets_or_gives_up_are_followed(proxy: IpvsProxy, world: ServiceLab) -> None:
    more = f"{NODE_IP.rpartition('.')[0]}.77"
    extra = f"  type: NodePort\n  externalIPs: [{more}]"
    ports = "[{name: http, port: 80, nodePort: 30080}]"
    proxy.apply("web", documents(service("web", "10.96.9.19", ports, extra=extra), endpoints("web", POD1)))
    proxy.start()
    assert answers(world.client, more, 80) == "pod1"

    world.node.ip("address", "add", f"{more}/24", "dev", "eth0")
    wait_until(lambda: answers(world.client, more, 30_080) == "pod1", "there are node ports at the new one")
    wait_until(lambda: more not in world.node.ip("address", "show", "dev", "kube-ipvs0"), "it is the node's alone")

    world.node.ip("address", "del", f"{more}/24", "dev", "eth0")
    wait_until(lambda: answers(world.client, more, 80) == "pod1", "the external IP is served on")
    wait_until(lambda: f"{more}:30080" not in proxy.servers(), "what had connections is gone with them")


def test_without_ipv6_on_this_node_ipv4_is_served(proxy: IpvsProxy, world: ServiceLab) -> None:
    families = (
        "  clusterIPs: [10.96.9.20, 'fd00:96::20']\n  ipFamilyPolicy: RequireDualStack\n  ipFamilies: [IPv4, IPv6]"
    )
    proxy.give("web", "10.96.9.20", POD1, extra=families)
    knob = "net.ipv6.conf.default.disable_ipv6"  # of new devices: those there are other tests' too
    world.node.run("sysctl", "-w", f"{knob}=1")
    try:
        proxy.start()
    finally:
        world.node.run("sysctl", "-w", f"{knob}=0")

    assert answers(world.client, "10.96.9.20", 80) == "pod1"
    proxy.give("other", "10.96.9.21", POD2)
    wait_until(lambda: answers(world.client, "10.96.9.21", 80) == "pod2", "changes are followed")
    assert "could not be loaded" not in proxy.log()
    assert "loading them again" not in proxy.log()


def test_an_endpoint_that_ipvs_refuses_does_not_affect_other_endpoints(proxy: IpvsProxy, world: ServiceLab) -> None:
    broadcast = f"{NODE_IP.rpartition('.')[0]}.255"
    proxy.give("mixed", "10.96.9.17", broadcast, POD2)
    proxy.give("web", "10.96.9.18", POD1)

    proxy.start()

    assert answers(world.client, "10.96.9.17", 80) == "pod2"
    assert answers(world.client, "10.96.9.18", 80) == "pod1"
    proxy.wait_logged(f"add {broadcast}:8080 at TCP 10.96.9.17:80: left out, IPVS does not support such endpoints")


def test_ipvs_is_looked_at_by_the_clock_and_not_after_each_change(world: ServiceLab) -> None:
    async def scenario() -> None:
        tables, asked = IpvsTables(), asyncio.Event()
        await tables.prepare()
        await tables.watch(asked.set)
        try:
            await tables.load(
                RuleUpdate(by_name([translation(ServicePort(name("ns/a"), 80, ("10.96.9.22",)), NEAR4)]), (), FACTS)
            )
            assert asked.is_set()
            world.node.run("ipvsadm", "-C")
            assert await tables.is_intact()
            asked.clear()
            await asked.wait()
            assert not await tables.is_intact()
        finally:
            tables.unwatch()
            await tables.remove()

    with world.node.inside(), asyncio.Runner() as runner:
        runner.run(scenario())


def test_services_addresses_do_not_reach_servers_of_the_node(proxy: IpvsProxy, world: ServiceLab) -> None:
    extra = "  type: LoadBalancer\n  externalTrafficPolicy: Local\n  healthCheckNodePort: 31000\n"
    extra += f"  externalIPs: [203.0.113.9, {NODE_IP}]"
    status = "status: {loadBalancer: {ingress: [{ip: 198.51.100.9}]}}"
    proxy.apply("web", documents(service("web", "10.96.9.24", extra=f"{extra}\n{status}"), endpoints("web", POD1)))
    server = world.node.start(sys.executable, "-m", "http.server", "10250")
    try:
        proxy.start()
        wait_until(lambda: is_open(world.client, NODE_IP, 10250), "the node's own server is met by its own address")
        for ip in ("203.0.113.9", "198.51.100.9", "10.96.9.24"):
            assert is_refused(world.client, ip, 10250)
            assert is_refused(world.node, ip, 10250)
        assert is_open(world.client, "198.51.100.9", 31_000)
    finally:
        server.kill()
        server.wait()


def is_open(host: Host, ip: str, port: int) -> bool:
    with contextlib.suppress(OSError), connect(host, ip, port):
        return True
    return False


def test_beside_kube_proxys_own_device_it_says_what_to_do_and_touches_nothing(
    proxy: IpvsProxy, world: ServiceLab
) -> None:
    world.node.ip("link", "add", "kube-ipvs0", "type", "dummy")
    proxy.give("web", "10.96.9.8", POD1)

    proxy.start(wait=False)

    assert proxy.process is not None
    assert proxy.process.wait(60) == 1
    proxy.wait_logged("kube-ipvs0 belongs to another program (kube-proxy in ipvs mode?): stop it")
    world.node.run(*proxy.command("cleanup"))
    assert "kube-ipvs0" in world.node.ip("link", "show")
    world.node.ip("link", "del", "kube-ipvs0")


def test_beside_another_of_ours_that_serves_it_changes_nothing_of_the_node(
    proxy: IpvsProxy, world: ServiceLab, tmp_path: Path
) -> None:
    other = Proxy(world, tmp_path / "other")
    other.start("--proxy-mode", "nftables")
    world.node.set_knob("ipv4/vs/conntrack", 0)
    proxy.start("--ipvs-strict-arp", wait=False)

    assert proxy.process is not None
    assert proxy.process.wait(60) == 1
    proxy.wait_logged("another userspace-proxy runs in this network namespace")
    knobs = ("ipv4/vs/conntrack", *STRICT_ARP)
    assert [world.node.run("cat", f"/proc/sys/net/{knob}").stdout.strip() for knob in knobs] == ["0", "0", "0"]
    assert other.stop() == 0


def test_after_a_kill_at_any_step_the_device_is_recognised_as_ours(proxy: IpvsProxy, world: ServiceLab) -> None:
    made = [line.text for line in device_lines(set(), ["10.96.9.26"], is_new=True)]
    for taken in range(1, len(made) + 1):
        world.node.run("ip", "-batch", "-", stdin="".join(f"{line}\n" for line in made[:taken]))
        with world.node.inside():
            asyncio.run(VirtualDevice().remove())
        assert "kube-ipvs0" not in world.node.ip("link", "show")

    world.node.ip(*made[0].split())
    proxy.give("web", "10.96.9.26", POD1)
    proxy.start()

    assert answers(world.client, "10.96.9.26", 80) == "pod1"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ctrl_c_removes_all_and_after_another_end_the_next_start_continues(
    proxy: IpvsProxy, world: ServiceLab, signum: signal.Signals
) -> None:
    proxy.give("web", "10.96.9.9", POD1)
    proxy.give("gone", "10.96.9.10", POD1)
    proxy.start()
    proxy.stop(signum, 60)
    if signum is signal.SIGINT:
        assert proxy.servers() == ""
        assert "userspace_proxy" not in world.node.run("nft", "list", "tables").stdout
        return
    assert answers(world.client, "10.96.9.9", 80) == "pod1", "the kernel serves on alone"
    proxy.delete("gone")

    proxy.start()

    assert answers(world.client, "10.96.9.9", 80) == "pod1"
    wait_until(lambda: "10.96.9.10" not in proxy.servers(), "what is gone is gone")


def test_new_clients_are_refused_at_once_while_open_connections_drain(proxy: IpvsProxy, world: ServiceLab) -> None:
    extra = "  type: NodePort\n  externalIPs: [203.0.113.10]"
    ports = "[{name: http, port: 80, nodePort: 30081}]"
    proxy.apply("web", documents(service("web", "10.96.9.27", ports, extra=extra), endpoints("web", POD1)))
    proxy.start("--drain-timeout", "60")
    with connect(world.client, "203.0.113.10", 80) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert b"pod1" in sock.recv(1 << 16)
        assert proxy.process is not None
        proxy.process.send_signal(signal.SIGINT)
        wait_until(lambda: f"-r {POD1}:8080 -m -w 0" in proxy.servers(), "nobody new is led there")

        for client in (world.client, world.node):
            for ip, port in (("10.96.9.27", 80), ("203.0.113.10", 80), (NODE_IP, 30081)):
                assert all(is_refused(client, ip, port, 1.0) for _ in range(10)), (client.name, ip, port)
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert b"pod1" in sock.recv(1 << 16)
    assert proxy.process.wait(60) == 0


def test_a_start_in_one_mode_removes_the_rules_of_another_mode(proxy: IpvsProxy, world: ServiceLab) -> None:
    proxy.give("web", "10.96.9.11", POD1)
    other = Proxy(world, proxy.folder)
    proxy.start()
    proxy.stop(signal.SIGKILL)

    other.start("--proxy-mode", "nftables")
    wait_until(lambda: proxy.servers() == "" and "kube-ipvs0" not in world.node.ip("link"), "all of it is gone")
    assert answers(world.client, "10.96.9.11", 80) == "pod1"

    other.stop(signal.SIGKILL)
    proxy.start()
    wait_until(lambda: "userspace_proxy_nat" not in world.node.run("nft", "list", "tables").stdout, "its table is gone")
    assert answers(world.client, "10.96.9.11", 80) == "pod1"


@pytest.mark.parametrize(
    ("hook", "rules", "passes"),
    [
        ("forward", "", False),
        ("forward", "ct state established accept;", True),
        ("forward", "ct status dnat accept;", False),
        ("input", "ct state established accept; ct status dnat accept;", False),
        ("input", "ip daddr 10.96.0.0/16 accept;", True),
    ],
)
def test_a_firewall_has_to_accept_requests_at_input_and_replies_at_forward(
    proxy: IpvsProxy, world: ServiceLab, hook: str, rules: str, passes: bool
) -> None:
    proxy.give("web", "10.96.9.12", POD1)
    proxy.start()
    assert answers(world.client, "10.96.9.12", 80) == "pod1"
    chain = f"type filter hook {hook} priority 0; policy drop; {rules}"
    world.node.run("nft", "-f", "-", stdin=f"table inet fw {{ chain c {{ {chain} }}; }}")
    try:
        with contextlib.nullcontext() if passes else pytest.raises(OSError):
            connect(world.client, "10.96.9.12", 80, timeout_s=3).close()
    finally:
        world.node.run("nft", "delete", "table", "inet", "fw")
