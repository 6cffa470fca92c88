"""Redirects in few words, and their texts on file."""

from __future__ import annotations

import os
import random
from pathlib import Path

from userspace_proxy.interfaces import Capture, Redirects
from userspace_proxy.model.names import L4Protocol, NamespacedName, ServicePortName
from userspace_proxy.model.service import Portal

TCP, UDP = L4Protocol.TCP, L4Protocol.UDP
REFUSE_PORT = 29_999
_GOLDEN = Path(__file__).parent.parent / "golden"

# The longest names that the API allows: a port of a container has 15, that of a Service 63.
LONGEST = ServicePortName(NamespacedName("n" * 63, "s" * 63), "a" * 15, TCP)
LONGEST_WITH_PORT = LONGEST._replace(port_name="p" * 63)


def name(text: str, protocol: L4Protocol = TCP) -> ServicePortName:
    """Return the name that is shown as ``namespace/name:port``."""
    service, _, port = text.partition(":")
    return ServicePortName(NamespacedName(*service.split("/")), port, protocol)


def redirects(*rows: tuple[str | None, int, ServicePortName, int], capture: Capture = Capture.REDIRECT) -> Redirects:
    """Return redirects from (ip, port, name, proxy port)."""
    portals = [Portal(ip, port, service_port.protocol) for ip, port, service_port, _ in rows]
    return Redirects(
        ports={portal: row[3] for portal, row in zip(portals, rows, strict=True)},
        names={portal: row[2] for portal, row in zip(portals, rows, strict=True)},
        refuse_port=REFUSE_PORT,
        capture=capture,
    )


NOTHING = redirects()
# Both families, both protocols, a node port, one without endpoints, and one number that serves TCP and UDP.
EVERYTHING_ROWS = (
    ("10.96.0.1", 80, name("shop/web:http"), 10_001),
    ("fd00:96::1", 80, name("shop/web:http"), 10_001),
    ("10.96.0.10", 53, name("kube-system/dns:dns", UDP), 10_002),
    ("10.96.0.10", 53, name("kube-system/dns:dns-tcp"), 10_003),
    ("fd00:96::10", 53, name("kube-system/dns:dns", UDP), 10_002),
    ("203.0.113.7", 443, name("shop/outside"), REFUSE_PORT),
    (None, 30_080, name("shop/web:http"), 10_001),
    (None, 30_053, name("kube-system/dns:dns", UDP), 10_002),
)
EVERYTHING = redirects(*EVERYTHING_ROWS)
EVERYTHING_BY_ADDRESS = redirects(*EVERYTHING_ROWS, capture=Capture.ADDRESS)
LONG_NAMES = redirects(
    ("10.96.0.1", 80, LONGEST, 10_001),
    ("fd00:96::1", 80, LONGEST, 10_001),
    ("10.96.0.2", 80, LONGEST_WITH_PORT, 10_002),
    (None, 30_000, LONGEST_WITH_PORT, 10_002),
)
CASES = {
    "nothing": NOTHING,
    "everything": EVERYTHING,
    "everything-by-address": EVERYTHING_BY_ADDRESS,
    "long-names": LONG_NAMES,
}


def any_redirects(chance: random.Random) -> Redirects:
    """Return some redirects out of a few portals, so that two of them have much in common."""
    ips = [None, "10.96.0.1", "10.96.0.2", "10.96.0.3", "fd00:96::1", "fd00:96::2"]
    rows = {}
    for _ in range(chance.randrange(14)):
        protocol = chance.choice((TCP, UDP))
        ip, port = chance.choice(ips), chance.choice((53, 80, 30_000))
        called = name(f"ns/{chance.choice('abc')}:p", protocol)
        rows[ip, port, protocol] = (ip, port, called, chance.choice((10_001, 10_002, 10_003, REFUSE_PORT)))
    return redirects(*rows.values(), capture=chance.choice(list(Capture)))


def assert_golden(file_name: str, text: str) -> None:
    """Compare *text* with the file; with UPDATE_GOLDEN=1 in the environment, write it instead."""
    path = _GOLDEN / file_name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert path.read_text() == text
