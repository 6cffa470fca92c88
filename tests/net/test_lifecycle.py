"""Starting, stopping, crashing and restarting; and the messages if a start is impossible."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.net.world import (
    POD1,
    POD2,
    Proxy,
    answers,
    ask_udp,
    background_requests,
    documents,
    endpoints,
    is_refused,
    open_connection,
    serve_web,
    service,
    take_port,
    told,
    traces,
    udp_socket,
    wait_until,
)
from userspace_proxy.lab import Lab, ServiceLab, ask, connect, start_nginx


@pytest.mark.parametrize("addresses", ["10.244.0.0/24", "192.168.48.0/20,fd00:96::/112", "10.97.0.0/16"])
def test_a_range_for_services_that_hosts_of_the_node_s_network_have_is_named(
    fresh_proxy: Proxy, addresses: str
) -> None:
    fresh_proxy.start("--service-cluster-ip-range", addresses)

    said = re.findall(r"WARNING Services get addresses of (\S+), and hosts of this node's network", fresh_proxy.log())
    assert said == [each for each in addresses.split(",") if each.startswith(("10.244", "192.168"))]


def test_sigterm_takes_rules_away_drains_and_exits_0(fresh_proxy: Proxy, world: ServiceLab) -> None:
    with open_connection(fresh_proxy) as sock:
        process = fresh_proxy.process
        assert process is not None

        process.send_signal(signal.SIGTERM)
        wait_until(lambda: "draining 1 connections" in fresh_proxy.log(), "it drains")

        assert "10.96.4.2" not in fresh_proxy.rules_text(), "rules go first, so that nobody new comes"
        assert process.poll() is None, "the open connection is waited for"
        sock.close()
        assert process.wait(20) == 0
    assert not traces(world.node)


def test_a_second_signal_cuts_what_is_left(fresh_proxy: Proxy, world: ServiceLab) -> None:
    with open_connection(fresh_proxy, "--drain-timeout", "60s") as sock:
        assert fresh_proxy.process is not None
        fresh_proxy.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "draining" in fresh_proxy.log(), "it drains")

        assert fresh_proxy.stop(signal.SIGTERM) == 0

        with pytest.raises(ConnectionResetError):
            sock.recv(5)


def test_a_second_instance_with_other_manifests_is_refused_and_harms_nothing(
    fresh_proxy: Proxy, world: ServiceLab, tmp_path: Path
) -> None:
    serve_web(fresh_proxy)
    fresh_proxy.start()

    other = tmp_path / "other.yaml"
    other.write_text(service("other", "10.96.4.2"))

    line = told(world.node, fresh_proxy, "run", str(other))

    assert "another userspace-proxy runs in this network namespace (process " in line
    assert f"it serves {fresh_proxy.manifests}" in line
    assert "--take-over always" in line
    assert answers(world.client, "10.96.4.1", 80)


def test_after_kill_9_a_restart_keeps_proxy_ports_and_addresses(fresh_proxy: Proxy, world: ServiceLab) -> None:
    fresh_proxy.apply("web", documents(service("web", "10.96.4.1"), endpoints("web", POD1), service("free", "")))
    fresh_proxy.start()
    before = fresh_proxy.rules_text()
    wait_until((fresh_proxy.folder / "state" / "allocations.json").exists, "the state is saved")
    fresh_proxy.stop(signal.SIGKILL)
    assert traces(world.node), "the rules are still there: nobody could take them away"

    fresh_proxy.start()

    assert fresh_proxy.rules_text() == before
    assert answers(world.client, "10.96.4.1", 80) == "pod1"
    fresh_proxy.stop()
    assert not traces(world.node)


def test_addresses_stay_without_a_state_folder_too(fresh_proxy: Proxy) -> None:
    fresh_proxy.apply("free", documents(*(service(f"free-{index}", "") for index in range(20))))
    fresh_proxy.start()
    before = fresh_proxy.rules_text()
    state = fresh_proxy.folder / "state" / "allocations.json"
    wait_until(state.exists, "the state is saved")
    fresh_proxy.stop(signal.SIGKILL)
    state.unlink()

    fresh_proxy.start()

    assert fresh_proxy.rules_text() == before


@pytest.mark.parametrize("rules", ["nftables", "iptables"])
def test_cleanup_removes_all_that_is_ours_and_nothing_else(fresh_proxy: Proxy, world: ServiceLab, rules: str) -> None:
    foreign = "table inet theirs { chain c { type filter hook input priority 5; tcp dport 7 accept; }; }"
    world.node.run("nft", foreign)
    world.node.run("iptables", "-t", "nat", "-A", "PREROUTING", "-p", "tcp", "--dport", "7", "-j", "ACCEPT")
    world.node.ip("route", "add", "10.200.0.0/16", "dev", "lo")
    try:
        fresh_proxy.rules = rules
        serve_web(fresh_proxy)
        fresh_proxy.start("--capture", "address")
        fresh_proxy.stop(signal.SIGKILL)
        assert traces(world.node)
        assert "169.254.77.7" in world.node.ip("address", "show", "dev", "lo")

        done = world.node.run(*fresh_proxy.command("cleanup"))

        assert "nothing of userspace-proxy is left" in done.stdout
        assert not traces(world.node)
        assert "169.254.77.7" not in world.node.ip("address", "show", "dev", "lo")
        assert "tcp dport 7 accept" in world.node.run("nft", "list", "table", "inet", "theirs").stdout
        assert "--dport 7 " in world.node.run("iptables-save", "-t", "nat").stdout
        assert "10.200.0.0/16" in world.node.ip("route", "show")
        assert world.node.run(*fresh_proxy.command("cleanup")).returncode == 0, "nothing to remove is no error"
    finally:
        world.node.run("nft", "delete table inet theirs")
        world.node.run("iptables", "-t", "nat", "-D", "PREROUTING", "-p", "tcp", "--dport", "7", "-j", "ACCEPT")
        world.node.ip("route", "del", "10.200.0.0/16", "dev", "lo")


def test_cleanup_needs_few_descriptors_on_a_node_with_many_processes(fresh_proxy: Proxy, world: ServiceLab) -> None:
    serve_web(fresh_proxy)
    fresh_proxy.start()
    fresh_proxy.stop(signal.SIGKILL)
    others = [subprocess.Popen(["sleep", "60"]) for _ in range(80)]
    try:
        command = ("sh", "-c", 'ulimit -n 64 && exec "$@"', "sh", *fresh_proxy.command("cleanup"))
        assert "nothing of userspace-proxy is left" in world.node.run(*command).stdout
        assert not traces(world.node)
    finally:
        for other in others:
            other.kill()
            other.wait()


def test_cleanup_leaves_a_running_proxy_alone(fresh_proxy: Proxy, world: ServiceLab) -> None:
    serve_web(fresh_proxy)
    fresh_proxy.start()

    done = world.node.run(*fresh_proxy.command("cleanup"), check=False)

    assert done.returncode == 1
    assert "is running" in done.stderr
    assert answers(world.client, "10.96.4.1", 80)


def test_switching_the_rule_language_by_restart_leaves_no_trace_of_the_other(
    fresh_proxy: Proxy, world: ServiceLab
) -> None:
    serve_web(fresh_proxy)
    fresh_proxy.rules = "iptables"
    fresh_proxy.start()
    fresh_proxy.stop(signal.SIGKILL)

    fresh_proxy.rules = "nftables"
    fresh_proxy.start()

    wait_until(lambda: "USERSPACE-PROXY" not in world.node.run("iptables-save").stdout, "the other's rules are gone")
    assert answers(world.client, "10.96.4.1", 80)


def test_health_says_503_with_the_reason_until_the_first_sync_is_in_force(
    fresh_proxy: Proxy, world: ServiceLab, tmp_path: Path
) -> None:
    """The rule tool is one that fails at first, as a kernel without the needed modules does."""
    tool = tmp_path / "bin" / "nft"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'Error: Could not process rule: Operation not supported' >&2\nexit 1\n")
    tool.chmod(0o755)
    serve_web(fresh_proxy)
    environment = ["env", f"PATH={tool.parent}:/usr/sbin:/usr/bin:/sbin:/bin"]
    fresh_proxy.process = world.node.start(
        *environment, *fresh_proxy.command(*fresh_proxy.run_arguments()), log=fresh_proxy.log_file
    )
    wait_until(lambda: "could not be loaded" in fresh_proxy.log(), "the refusal is logged")

    status, body = fresh_proxy.get("/healthz", 10256)
    assert (status, json.loads(body)["healthy"]) == (503, False)
    assert "Operation not supported" in json.loads(body)["reason"]
    assert fresh_proxy.get("/livez", 10256)[0] == 200, "for two sync periods there is no reason to be replaced"

    tool.unlink()
    fresh_proxy.wait_ready()
    status, body = fresh_proxy.get("/healthz", 10256)
    assert (status, json.loads(body)["healthy"]) == (200, True)
    assert fresh_proxy.get("/livez", 10256)[0] == 200
    assert fresh_proxy.get("/proxyMode", 10249) == (200, "userspace")


def test_rules_that_cannot_be_loaded_leave_the_old_ones_serving(
    fresh_proxy: Proxy, world: ServiceLab, tmp_path: Path
) -> None:
    tool = tmp_path / "bin" / "nft"
    tool.parent.mkdir()
    serve_web(fresh_proxy)
    environment = ["env", f"PATH={tool.parent}:/usr/sbin:/usr/bin:/sbin:/bin"]
    arguments = [*fresh_proxy.run_arguments(), "--sync-period", "1s"]
    fresh_proxy.process = world.node.start(*environment, *fresh_proxy.command(*arguments), log=fresh_proxy.log_file)
    fresh_proxy.wait_ready()
    tool.write_text("#!/bin/sh\necho 'Error: no' >&2\nexit 1\n")
    tool.chmod(0o755)

    local = "  type: NodePort\n  externalTrafficPolicy: Local"  # needs another rule, not only elements
    fresh_proxy.apply("more", documents(service("more", "10.96.4.9", extra=local), endpoints("more", POD1)))
    wait_until(lambda: "could not be loaded" in fresh_proxy.log(), "the refusal is logged")

    assert answers(world.client, "10.96.4.1", 80), "what was in force still is"
    assert fresh_proxy.metric("userspace_proxy_sync_failing_seconds") > 0
    status, body = fresh_proxy.get("/healthz", 10256)
    assert (status, "Error: no" in json.loads(body)["failing"]) == (200, True)
    wait_until(lambda: fresh_proxy.get("/healthz", 10256)[0] == 503, "after two sync periods it is an illness")
    assert fresh_proxy.get("/livez", 10256)[0] == 503
    tool.unlink()
    wait_until(lambda: answers(world.client, "10.96.4.9", 80), "the new Service is served once rules can be loaded")
    wait_until(lambda: fresh_proxy.get("/healthz", 10256)[0] == 200, "it is well again")


def test_udp_flows_of_a_dead_proxy_reach_the_new_one(fresh_proxy: Proxy, world: ServiceLab) -> None:
    serve_web(fresh_proxy)
    fresh_proxy.start()
    with udp_socket(world.client, "10.96.4.1", 53, timeout_s=0.1) as sock:

        def answer() -> str:
            try:
                sock.send(b"who")
                return sock.recv(100).decode()
            except OSError:
                return ""

        wait_until(lambda: answer() in ("pod1", "pod2"), "it is served")
        fresh_proxy.stop(signal.SIGKILL)
        fresh_proxy.start()
        wait_until(lambda: answer() in ("pod1", "pod2"), "the same socket is served by the new process")


def test_logs_and_access_log_are_json_where_asked(fresh_proxy: Proxy, world: ServiceLab) -> None:
    serve_web(fresh_proxy)
    fresh_proxy.start("--log-format", "json")
    ask(world.client, "10.96.4.1")
    fresh_proxy.stop()

    lines = [json.loads(line) for line in fresh_proxy.log().splitlines()]
    (access,) = [json.loads(line) for line in fresh_proxy.access_lines()]

    assert {"time", "level", "message"} <= lines[0].keys()
    assert access["service"] == "default/web"
    assert access["portal"] == "10.96.4.1:80"
    assert access["endpoint"] == f"{POD1}:8080"
    assert (access["why"], access["end"]) == ("round robin", "closed")
    assert access["bytesToBackend"] == 18


# ---- what a user is told


def test_a_wrong_path_is_named(fresh_proxy: Proxy, world: ServiceLab) -> None:
    assert "no-such.yaml: no such file or folder" in told(world.node, fresh_proxy, "run", "no-such.yaml")


def test_missing_privileges_are_named_with_the_fix(fresh_proxy: Proxy, world: ServiceLab) -> None:
    drop = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs")
    line = told(world.node, fresh_proxy, *fresh_proxy.run_arguments(), prefix=drop)

    assert "needs CAP_NET_ADMIN" in line
    assert "sudo" in line


def test_a_taken_port_is_named_with_its_flag(fresh_proxy: Proxy, world: ServiceLab) -> None:
    serve_web(fresh_proxy)
    with world.node.inside():
        taken = socket.create_server(("0.0.0.0", 10256))
    with taken:
        line = told(world.node, fresh_proxy, *fresh_proxy.run_arguments()[:-2])

    assert "--healthz-bind-address 0.0.0.0:10256" in line
    assert "another program has it" in line
    assert not traces(world.node)


def test_an_unknown_congestion_control_is_named(fresh_proxy: Proxy, world: ServiceLab) -> None:
    serve_web(fresh_proxy)

    line = told(world.node, fresh_proxy, *fresh_proxy.run_arguments(), "--congestion-control", "wishful")

    assert "--congestion-control wishful" in line
    assert "tcp_available_congestion_control" in line


def test_limits_for_clients_are_kept_by_the_whole_process(fresh_proxy: Proxy, world: ServiceLab) -> None:
    serve_web(fresh_proxy)
    fresh_proxy.start("--connections-per-client", "2", "--congestion-control", "reno")
    held = [connect(world.client, "10.96.4.1", 80) for _ in range(2)]

    with pytest.raises(ConnectionResetError), connect(world.client, "10.96.4.1", 80) as third:
        third.recv(1)

    assert fresh_proxy.metric("userspace_proxy_limited_connections_total") == 1
    for sock in held:
        sock.close()
    wait_until(lambda: answers(world.client, "10.96.4.1", 80), "there is room again")


def test_a_missing_package_is_named(fresh_proxy: Proxy, world: ServiceLab, tmp_path: Path) -> None:
    empty = tmp_path / "bin"
    empty.mkdir()
    hide = 'mount -t tmpfs tmpfs /usr/sbin && mount -t tmpfs tmpfs /sbin; exec "$@"'
    command = fresh_proxy.command(*fresh_proxy.run_arguments())
    done = subprocess.run(
        world.node.command("unshare", "--mount", "sh", "-c", hide, "sh", *command),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )

    assert done.returncode == 1
    assert "install the package nftables" in done.stderr


def test_a_manifest_that_is_broken_at_the_start_is_named_and_the_rest_is_served(
    fresh_proxy: Proxy, world: ServiceLab
) -> None:
    fresh_proxy.apply("broken", "kind: Service\n  metadata: {}\n")
    serve_web(fresh_proxy)

    fresh_proxy.start()

    assert answers(world.client, "10.96.4.1", 80)
    fresh_proxy.wait_logged("broken.yaml:2: ")
    status, body = fresh_proxy.get("/healthz", 10256)
    assert status == 200
    assert "broken.yaml:2" in json.loads(body)["problems"][0]


def test_a_proxy_port_that_another_program_has_is_not_used(fresh_proxy: Proxy, world: ServiceLab) -> None:
    serve_web(fresh_proxy)
    fresh_proxy.start()
    port = fresh_proxy.proxy_port("default/web:http")
    fresh_proxy.stop()

    with take_port(world.node, port):
        fresh_proxy.start()

        assert fresh_proxy.proxy_port("default/web:http") != port
        assert answers(world.client, "10.96.4.1", 80)


def test_stdin_is_read_as_a_manifest(fresh_proxy: Proxy, world: ServiceLab) -> None:
    manifest = documents(service("piped", "10.96.4.5"), endpoints("piped", POD1))
    process = subprocess.Popen(
        world.node.command(*fresh_proxy.command("run", "-", "--state-dir", str(fresh_proxy.folder / "state"))),
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin is not None
    process.stdin.write(manifest.encode())
    process.stdin.close()

    wait_until(lambda: answers(world.client, "10.96.4.5", 80) == "pod1", "it is served")

    process.terminate()
    assert process.wait(20) == 0


def test_routes_for_clients_on_the_node_are_there_and_go(fresh_proxy: Proxy, world: ServiceLab) -> None:
    external = service("far", "10.96.4.9", extra='  externalIPs: ["172.30.5.5"]')
    fresh_proxy.apply("far", documents(external, endpoints("far", POD1)))
    fresh_proxy.start()

    assert answers(world.node, "172.30.5.5", 80) == "pod1"
    assert is_refused(world.node, "172.30.5.5", 81) is False

    fresh_proxy.stop()
    assert not world.node.ip("route", "show", "proto", "107")


def test_a_folder_of_the_access_log_that_does_not_exist_is_named(fresh_proxy: Proxy, world: ServiceLab) -> None:
    serve_web(fresh_proxy)
    arguments = [*fresh_proxy.run_arguments()[:-1], "/no/such/folder/access.log"]

    assert "/no/such/folder/access.log: its folder does not exist" in told(world.node, fresh_proxy, *arguments)


def test_a_node_without_any_address_serves_itself(tmp_path: Path) -> None:
    """As in `unshare --net`, where lessons run with only ``lo``."""
    with Lab() as lab:
        lonely = lab.add("lonely")
        start_nginx(lonely, tmp_path)
        proxy = Proxy(ServiceLab(lab, lonely, lonely, ()), tmp_path / "proxy")
        proxy.apply("web", documents(service("web", "10.96.4.8"), endpoints("web", "127.0.0.1")))
        proxy.start()

        assert ask(lonely, "10.96.4.8") == "lonely"
        assert proxy.stop() == 0


def test_a_worker_that_is_killed_under_load_fails_its_own_connections_alone(
    fresh_proxy: Proxy, world: ServiceLab
) -> None:
    serve_web(fresh_proxy)
    fresh_proxy.start()

    with background_requests(lambda: ask(world.client, "10.96.4.1")) as outcomes:
        wait_until(lambda: len(outcomes) > 50, "requests flow")
        os.kill(fresh_proxy.workers()[0], signal.SIGKILL)
        killed_at = len(outcomes)
        wait_until(lambda: len(outcomes) > killed_at + 100, "requests flow again")

    failed = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert len(failed) <= 1, "only the request that was in its hands"
    fresh_proxy.wait_logged("another one takes its listeners")
    assert fresh_proxy.metric("userspace_proxy_worker_restarts_total") == 1
    assert ask_udp(world.client, "10.96.4.1") in ("pod1", "pod2")


def test_all_in_one_process_serves_too(fresh_proxy: Proxy, world: ServiceLab) -> None:
    serve_web(fresh_proxy)
    fresh_proxy.start("--workers", "0")

    assert {ask(world.client, "10.96.4.1") for _ in range(2)} == {"pod1", "pod2"}
    fresh_proxy.stop()
    assert len(fresh_proxy.access_lines()) == 2


def test_a_closed_terminal_stops_the_proxy_cleanly(fresh_proxy: Proxy, world: ServiceLab) -> None:
    serve_web(fresh_proxy)
    fresh_proxy.start()

    assert fresh_proxy.stop(signal.SIGHUP) == 0

    assert not traces(world.node)


def test_running_out_of_descriptors_at_the_start_ends_nothing(fresh_proxy: Proxy, world: ServiceLab) -> None:
    fresh_proxy.apply("many", documents(*(service(f"many-{index}", "") for index in range(200))))
    serve_web(fresh_proxy)
    command = fresh_proxy.command(*fresh_proxy.run_arguments())
    fresh_proxy.process = world.node.start("prlimit", "--nofile=256:256", *command, log=fresh_proxy.log_file)

    wait_until(lambda: "has no listener" in fresh_proxy.log(), "the want is named")

    assert fresh_proxy.process.poll() is None
    assert "Traceback" not in fresh_proxy.log()


def test_health_is_answered_however_many_connections_are_held_to_it(fresh_proxy: Proxy, world: ServiceLab) -> None:
    serve_web(fresh_proxy)
    fresh_proxy.start()
    held = []
    for _ in range(200):
        try:
            held.append(connect(world.client, "192.168.50.1", 10256))
        except OSError:
            break
    assert fresh_proxy.process is not None
    descriptors = len(list(Path(f"/proc/{fresh_proxy.process.pid}/fd").iterdir()))

    assert descriptors < 200, "what a client can make us hold has bounds"
    assert answers(world.client, "10.96.4.1", 80)
    for sock in held:
        sock.close()
    wait_until(lambda: _health(fresh_proxy) == 200, "health is answered again")


def _health(proxy: Proxy) -> int:
    """Return the status; 0 where the connection was not accepted."""
    try:
        return proxy.get("/healthz", 10256)[0]
    except OSError:
        return 0


def test_no_room_for_endpoints_leaves_services_and_says_so(fresh_proxy: Proxy) -> None:
    fresh_proxy.start("--metrics-endpoint-series", "0")
    fresh_proxy.serve("told", "10.96.4.1", POD1, POD2)

    assert "userspace_proxy_endpoint_connections_total{" not in fresh_proxy.get("/metrics", 10249)[1]
    assert fresh_proxy.metric("userspace_proxy_hidden_endpoints") == 4
    assert fresh_proxy.metric("userspace_proxy_endpoints", service="told") == 4
