"""The arguments of `trace`, valid and invalid."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from userspace_proxy.trace.command import request
from userspace_proxy.trace.table import PacketFilter, commands
from userspace_proxy.trace.tracer import TraceRequest

PLAIN: dict[str, Any] = {"wait": False, "timeout_s": 30.0, "client_ip": "", "from_pod": None}


def test_a_portal_is_an_address_a_port_and_an_optional_protocol() -> None:
    assert request("10.96.0.11:80", **PLAIN) == TraceRequest("10.96.0.11", 80, "tcp")
    assert request("10.96.0.53:53/udp", **PLAIN) == TraceRequest("10.96.0.53", 53, "udp")
    assert request("[FD00:96::1]:80", **PLAIN) == TraceRequest("fd00:96::1", 80, "tcp")


@pytest.mark.parametrize(
    ("portal", "options", "said"),
    [
        ("web:80", {}, "'web:80' is no portal; write 10.96.0.11:80, 10.96.0.53:53/udp or [fd00::1]:80"),
        ("10.96.0.11", {}, "'10.96.0.11' is no portal"),
        ("[fd00::1%1 ; add table ip t]:80", {}, "is no portal"),
        ("10.96.0.11:70000", {}, "70000 is no port"),
        ("10.96.0.11:80/sctp", {}, "'sctp' is neither tcp nor udp"),
        ("10.96.0.11:80", {"client_ip": "pod1"}, "--from 'pod1' is no address"),
        ("10.96.0.11:80", {"client_ip": "fd00::1"}, "a client of that family cannot ask an IPv4 portal"),
        ("10.96.0.11:80", {"from_pod": "nowhere"}, "--from-pod: there is no network namespace nowhere"),
        ("10.96.0.11:80", {"from_pod": "1", "wait": True}, "it goes with neither --wait nor --from"),
    ],
)
def test_invalid_arguments_are_reported_in_one_line(portal: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as error:
        request(portal, **{**PLAIN, **options})

    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_client_is_waited_for() -> None:
    assert request("10.96.0.11:80", **{**PLAIN, "wait": True}).awaited_s == 30.0
    named = request("10.96.0.11:80", **{**PLAIN, "client_ip": "192.168.50.2"})
    assert (named.client_ip, named.awaited_s) == ("192.168.50.2", 30.0)


def test_a_pod_is_named_by_a_process_in_it() -> None:
    asked = request("10.96.0.11:80", **{**PLAIN, "from_pod": str(os.getpid())})

    assert asked.namespace == Path(f"/proc/{os.getpid()}/ns/net")
    assert asked.awaited_s == 0


def test_every_rule_of_the_table_follows_a_bounded_number_of_packets() -> None:
    for wanted in (PacketFilter("10.96.0.11", 80, "tcp"), PacketFilter("fd00::1", 53, "udp", "fd00::2", 4711)):
        lines = commands(wanted).splitlines()

        assert lines[0] == "add table inet userspace_proxy_trace { flags owner; }"
        rules = [line for line in lines if line.startswith("add rule")]
        assert len(rules) == 8
        assert all("limit rate 1/day burst" in line and line.endswith("meta nftrace set 1") for line in rules)
