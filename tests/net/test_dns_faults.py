"""Cluster DNS when a process ends, or is followed by another one."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
from pathlib import Path

import dns.flags
import dns.rcode
import pytest

from tests.net.test_dns import ARGUMENTS, CLUSTER, SERVER, WEB, asked, found
from tests.net.world import Proxy, wait_until
from userspace_proxy.lab import ServiceLab

NAME = f"web.default{CLUSTER}"


def dns_processes(proxy: Proxy) -> list[int]:
    """Return the ids of the DNS processes on the proxy's node."""
    command = ["ip", "netns", "pids", proxy.node.name]
    pids = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    ids = []
    for pid in pids:
        with contextlib.suppress(OSError):  # it has just ended
            if b"userspace_proxy.dns.server" in Path(f"/proc/{pid}/cmdline").read_bytes():
                ids.append(int(pid))
    return ids


def started(proxy: Proxy, *more: str) -> Proxy:
    proxy.apply("web", WEB)
    proxy.start(*ARGUMENTS, *more)
    wait_until(lambda: len(dns_processes(proxy)) == 1, "the DNS process of a test before has ended")
    wait_until(lambda: found(asked(proxy.node, NAME)) == ["10.96.0.11"], "the name is answered")
    return proxy


class Asking:
    """Asks for one name again and again; ``wrong`` has the answers that were not the right one."""

    def __init__(self, proxy: Proxy) -> None:
        self.wrong: list[str] = []
        self.count = 0
        self._ends = threading.Event()
        self._proxy = proxy
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        while not self._ends.is_set():
            try:
                answer = asked(self._proxy.node, NAME)
                if found(answer) != ["10.96.0.11"]:
                    self.wrong.append(dns.rcode.to_text(answer.rcode()))
            except OSError as error:
                self.wrong.append(repr(error))
            self.count += 1

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()


def test_the_process_has_no_capabilities(fresh_proxy: Proxy) -> None:
    (pid,) = dns_processes(started(fresh_proxy))

    for thread in Path(f"/proc/{pid}/task").iterdir():
        status = dict(line.split(":\t", 1) for line in (thread / "status").read_text().splitlines())
        assert {int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
        assert status["NoNewPrivs"] == "1"


def test_a_process_that_dies_is_replaced_and_loses_only_the_query_that_it_has_read(fresh_proxy: Proxy) -> None:
    proxy = started(fresh_proxy)
    (before,) = dns_processes(proxy)

    with Asking(proxy) as asking:
        os.kill(before, signal.SIGKILL)
        wait_until(lambda: dns_processes(proxy) not in ([], [before]), "there is another one")
        count = asking.count
        wait_until(lambda: asking.count > count + 3, "it answers")

    assert asking.wrong in ([], ["TimeoutError('timed out')"])


def test_a_successor_serves_on_without_a_wrong_answer(fresh_proxy: Proxy, world: ServiceLab, tmp_path: Path) -> None:
    proxy = started(fresh_proxy)
    (before,) = dns_processes(proxy)
    successor = Proxy(world, tmp_path)

    with Asking(proxy) as asking:
        successor.start(*ARGUMENTS)
        wait_until(lambda: before not in dns_processes(proxy), "the process before has ended")
        count = asking.count
        wait_until(lambda: asking.count > count + 3, "the successor's answers")

    assert asking.wrong == []
    assert proxy.process is not None
    assert proxy.process.wait(20) == 0
    assert successor.stop() == 0
    assert dns_processes(proxy) == []


def test_a_restart_in_place_serves_on_without_a_wrong_answer(fresh_proxy: Proxy) -> None:
    proxy = started(fresh_proxy)
    (before,) = dns_processes(proxy)
    assert proxy.process is not None

    with Asking(proxy) as asking:
        proxy.process.send_signal(signal.SIGUSR2)
        wait_until(lambda: dns_processes(proxy) and before not in dns_processes(proxy), "the process before has ended")
        count = asking.count
        wait_until(lambda: asking.count > count + 3, "it answers")

    assert asking.wrong == []
    assert proxy.stop() == 0


def test_cluster_dns_answers_while_the_control_process_is_replaced(fresh_proxy: Proxy) -> None:
    proxy = started(fresh_proxy)
    (before,) = dns_processes(proxy)
    assert proxy.process is not None

    proxy.process.kill()
    proxy.process.wait(20)
    assert found(asked(proxy.node, NAME)) == ["10.96.0.11"]

    proxy.start(*ARGUMENTS)
    wait_until(lambda: before not in dns_processes(proxy), "the process before has ended")
    assert found(asked(proxy.node, NAME)) == ["10.96.0.11"]


def test_cleanup_after_a_crash_leaves_no_process_and_no_address(fresh_proxy: Proxy) -> None:
    proxy = started(fresh_proxy)
    assert proxy.process is not None
    proxy.process.kill()
    proxy.process.wait(20)

    proxy.node.run(*proxy.command("cleanup"))

    assert own_addresses(proxy) == ""
    assert dns_processes(proxy) == []


@pytest.mark.parametrize("mode", ["nftables", "iptables"])
def test_a_kernel_mode_that_leaves_its_rules_takes_the_address_of_cluster_dns_away(
    fresh_proxy: Proxy, mode: str
) -> None:
    proxy = started(fresh_proxy, "--proxy-mode", mode)

    assert proxy.stop(signal.SIGTERM) == 0

    assert "10.96.0.11" in proxy.node.run("nft", "list", "ruleset").stdout
    assert own_addresses(proxy) == ""
    assert dns_processes(proxy) == []


def test_an_address_that_a_crashed_process_left_is_removed(fresh_proxy: Proxy) -> None:
    proxy = started(fresh_proxy)
    assert proxy.process is not None
    proxy.process.kill()
    proxy.process.wait(20)
    assert own_addresses(proxy) != ""

    proxy.start()

    wait_until(lambda: own_addresses(proxy) == "", "the address is gone")
    wait_until(lambda: dns_processes(proxy) == [], "the process ends, too")


def own_addresses(proxy: Proxy) -> str:
    listing = ("route", "show", "table", "local", "proto", "107")
    return proxy.node.ip("-4", *listing) + proxy.node.ip("-6", *listing)


def test_an_address_that_a_service_has_is_refused(fresh_proxy: Proxy) -> None:
    proxy = fresh_proxy
    proxy.apply("web", WEB.replace("10.96.0.11", SERVER))
    proxy.start(*ARGUMENTS, wait=False)
    assert proxy.process is not None

    assert proxy.process.wait(30) == 1
    assert f"--dns {SERVER}: Service default/web has this address; choose another one" in proxy.log()
    assert own_addresses(proxy) == ""


def test_a_service_does_not_get_the_address_of_cluster_dns(fresh_proxy: Proxy) -> None:
    proxy = started(fresh_proxy)

    proxy.apply("other", WEB.replace("10.96.0.11", SERVER).replace("web", "other"))

    proxy.wait_logged(f"{SERVER} is the address of cluster DNS (--dns)")
    assert found(asked(proxy.node, NAME)) == ["10.96.0.11"]


def test_a_port_that_another_program_has_is_named(fresh_proxy: Proxy) -> None:
    proxy = fresh_proxy
    wait_until(lambda: dns_processes(proxy) == [], "the port is free")
    with proxy.node.inside():
        other = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        other.bind(("0.0.0.0", 53))
    with other:
        proxy.apply("web", WEB)
        proxy.start(*ARGUMENTS, wait=False)
        assert proxy.process is not None

        assert proxy.process.wait(30) == 1
    assert f"--dns {SERVER}: another program listens there" in proxy.log()


def test_without_the_right_to_port_53_the_error_names_the_remedies(fresh_proxy: Proxy) -> None:
    proxy = fresh_proxy
    proxy.apply("web", WEB)
    without = ("setpriv", "--bounding-set", "-net_bind_service", "--inh-caps", "-net_bind_service")

    done = proxy.node.run(*without, *proxy.command(*proxy.run_arguments(), *ARGUMENTS), check=False)

    assert done.returncode == 1
    assert f"--dns {SERVER}: port 53 needs CAP_NET_BIND_SERVICE" in done.stderr
    assert "net.ipv4.ip_unprivileged_port_start=53" in done.stderr
    assert own_addresses(proxy) == ""


def test_four_thousand_endpoints_are_answered_over_tcp_and_truncated_over_udp(fresh_proxy: Proxy) -> None:
    proxy = fresh_proxy
    ips = [f"10.245.{index >> 8}.{index & 255}" for index in range(4_000)]
    listed = ", ".join(f"{{addresses: [{ip}]}}" for ip in ips)
    proxy.apply("many", _MANY % listed)
    proxy.start(*ARGUMENTS)

    wait_until(lambda: asked(proxy.node, f"many.default{CLUSTER}").flags & dns.flags.TC, "a truncated answer")
    assert found(asked(proxy.node, f"many.default{CLUSTER}", over_tcp=True)) == sorted(ips)


_MANY = """
apiVersion: v1
kind: Service
metadata: {name: many}
spec: {clusterIP: None, ports: [{name: http, port: 80}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: many-1, labels: {kubernetes.io/service-name: many}}
addressType: IPv4
ports: [{name: http, port: 80}]
endpoints: [%s]
"""
