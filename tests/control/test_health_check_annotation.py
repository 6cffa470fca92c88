"""The annotation `userspace-proxy/health-check`: valid texts, and the problems of invalid ones."""

from __future__ import annotations

import re

import pytest

from tests.control.given import service
from userspace_proxy.control.decode import HEALTH_CHECK, Allocation, service_ports
from userspace_proxy.control.decode.probes import read_probe
from userspace_proxy.model.names import NamespacedName
from userspace_proxy.model.probe import ProbeKind, ProbeSpec

TCP, HTTP, UDP = ProbeKind


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("tcp", ProbeSpec(TCP, interval_s=2.0, timeout_s=1.0, rise=2, fall=3, panic=True)),
        (" tcp  fall=1\n panic=off ", ProbeSpec(TCP, fall=1, panic=False)),
        ("tcp interval=500ms", ProbeSpec(TCP, interval_s=0.5, timeout_s=0.5)),
        ("tcp interval=1m30s timeout=2s rise=1", ProbeSpec(TCP, interval_s=90.0, timeout_s=2.0, rise=1)),
        ("http", ProbeSpec(HTTP, path="/", statuses=(200, 399))),
        (
            "http path=/healthz?full=1 port=8081 status=200-299",
            ProbeSpec(HTTP, port=8081, path="/healthz?full=1", statuses=(200, 299)),
        ),
        ("http status=204", ProbeSpec(HTTP, statuses=(204, 204))),
        ("udp send=ping expect=pong", ProbeSpec(UDP, send=b"ping", expect=b"pong")),
        ("udp send='are you there' expect=é", ProbeSpec(UDP, send=b"are you there", expect="é".encode())),
        ('udp send="hex:00 ff1b"', ProbeSpec(UDP, send=b"\x00\xff\x1b")),
    ],
)
def test_a_health_check_is_a_kind_and_its_settings(text: str, spec: ProbeSpec) -> None:
    assert read_probe(text) == spec


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it begins with '', not with one of tcp, http, udp"),
        ("htp path=/", "it begins with 'htp'"),
        ("tcp path=/", "tcp has no setting 'path'; it has port, interval, timeout, rise, fall, panic"),
        ("tcp intervall=2s", "did you mean interval?"),
        ("tcp fall", "'fall' has no value"),
        ("tcp fall=1 fall=2", "'fall' is stated twice"),
        ("tcp fall=0", "fall: '0' is no number from 1 to 100"),
        ("tcp rise=²", "rise: '²' is no number"),
        ("tcp port=70000", "port: '70000' is no number from 1 to 65535"),
        ("tcp interval=2", "interval: '2' is no duration; write such as 250ms"),
        ("tcp interval=10ms", "interval: '10ms' is not from 100ms to 1h"),
        ("tcp timeout=3s", "the timeout is longer than the interval"),
        ("tcp timeout=0", "timeout: '0' is not from 10ms"),
        ("tcp panic=yes", "panic: 'yes' is neither on nor off"),
        ("http path=healthz", "path: 'healthz' is no path"),
        ("http path='/a b'", "path: '/a b' is no path"),
        ("http path='/\r\nHost: other'", "is no path"),
        (f"http path=/{'x' * 600}", "is no path of up to 512 ASCII characters"),
        ("http status=600", "status: '600' is no status"),
        ("http status=299-200", "status: '299-200' is no status"),
        ("udp", "udp needs send="),
        ("udp send=", "udp needs send="),
        ("udp send=hex:0", "send: 'hex:0' is not made of pairs of hexadecimal digits"),
        (f"udp send={'x' * 600}", "send: it has 600 bytes, more than 512"),
        ("udp send='x", "No closing quotation"),
        ("tcp" + " " * 5_000, "it is longer than 4096 characters"),
    ],
)
def test_a_mistake_is_named(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        read_probe(text)


def test_a_service_with_an_invalid_health_check_is_served_without_one_and_it_is_reported() -> None:
    allocation = Allocation(("10.96.0.1",))
    wrong, right = (service(annotations={HEALTH_CHECK: text}) for text in ("tcp fall=no", "tcp fall=1"))

    ports, problems = service_ports(NamespacedName("default", "web"), wrong, allocation)
    assert [port.probe for port in ports.values()] == [None]
    assert [(problem.field, problem.reason) for problem in problems] == [
        (
            "metadata.annotations.userspace-proxy/health-check",
            "'tcp fall=no' is no health check: fall: 'no' is no number from 1 to 100",
        )
    ]
    ports, problems = service_ports(NamespacedName("default", "web"), right, allocation)
    assert [port.probe for port in ports.values()] == [ProbeSpec(TCP, fall=1)]
    assert problems == []
