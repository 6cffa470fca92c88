"""Which UDP flows are forgotten when a portal leads elsewhere, and that no other is touched."""

from __future__ import annotations

import ipaddress
import subprocess
from collections.abc import Iterator, Mapping

import pytest

from userspace_proxy.model.endpoint import Family
from userspace_proxy.model.names import L4Protocol
from userspace_proxy.model.service import Portal
from userspace_proxy.netfilter.conntrack import (
    ANY_IP,
    Answering,
    Flow,
    forget_early_connections,
    forget_udp_flows,
    stale_flows,
)
from userspace_proxy.netfilter.nfnetlink import Entry, TcpState, delete_flows, read_entries
from userspace_proxy.netlink import ip_text

DNS = Portal("10.96.0.10", 53, L4Protocol.UDP)
DNS6 = Portal("fd00:96::10", 53, L4Protocol.UDP)
NODE_PORT = Portal("0.0.0.0", 30_053, L4Protocol.UDP)
WEB = Portal("10.96.0.1", 80, L4Protocol.TCP)


def by(*ports: int) -> Answering:
    """Return answers from these local ports, of whichever address."""
    return frozenset((ANY_IP, port) for port in ports)


def flow(
    asked: str,
    port: int,
    answered_from: int,
    *,
    client: str = "192.168.50.2",
    sport: int = 4_000,
    answered_by: str = "192.168.50.1",
) -> Entry:
    """Return an entry of conntrack: *answered_from* is the port that its replies come from."""
    source, to, by = (ipaddress.ip_address(ip).packed for ip in (client, asked, answered_by))
    return Entry(source, sport, to, port, by, answered_from)


# ---- which flows are stale


@pytest.mark.parametrize(
    ("changed", "entry", "stale"),
    [
        ({DNS: by(10_002)}, flow("10.96.0.10", 53, 10_001), {("10.96.0.10", 53)}),
        ({DNS: by(10_002)}, flow("10.96.0.10", 53, 10_002), set()),
        ({DNS: by(10_002)}, flow("10.96.0.10", 53, 53), {("10.96.0.10", 53)}),
        ({DNS: set()}, flow("10.96.0.10", 53, 10_001), {("10.96.0.10", 53)}),
        ({DNS: by(10_002)}, flow("10.96.0.10", 54, 10_001), set()),
        ({DNS: by(10_002)}, flow("10.96.0.11", 53, 10_001), set()),
        ({DNS6: by(10_002)}, flow("fd00:96::10", 53, 10_001), {("fd00:96::10", 53)}),
        ({NODE_PORT: by(10_002)}, flow("192.168.50.1", 30_053, 10_001), {("192.168.50.1", 30_053)}),
        ({NODE_PORT: by(10_002)}, flow("192.168.50.1", 30_053, 10_002), set()),
        ({NODE_PORT: by(10_002), DNS: by(10_003)}, flow("10.96.0.10", 53, 10_003), set()),
    ],
)
def test_a_flow_is_stale_when_its_replies_come_from_another_port_than_wanted(
    changed: Mapping[Portal, Answering], entry: Entry, stale: set[tuple[str, int]]
) -> None:
    assert {flow.asked for flow in stale_flows([entry], changed)} == stale


def test_flows_whose_client_port_equals_the_portals_port_are_kept() -> None:
    assert stale_flows([flow("8.8.8.8", 123, 123, sport=53)], {DNS: by(10_002)}) == []


def test_in_a_kernel_mode_a_flow_is_stale_when_its_endpoint_serves_no_more() -> None:
    kept, gone = ("10.1.0.1", 5353), ("10.1.0.2", 5353)
    entries = [
        flow("10.96.0.10", 53, port, sport=4_000 + n, answered_by=ip)
        for n, (ip, port) in enumerate([kept, gone, (kept[0], 5354)])
    ]

    stale = stale_flows(entries, {DNS: frozenset({kept})})

    assert [flow.client for flow in stale] == [("192.168.50.2", 4_001), ("192.168.50.2", 4_002)]


def test_each_flow_is_named_by_its_client_and_its_destination() -> None:
    entries = [flow("10.96.0.10", 53, 10_001, sport=4_000 + n) for n in range(50)]

    assert stale_flows(entries, {DNS: by(10_002)}) == [
        Flow(("192.168.50.2", 4_000 + n), ("10.96.0.10", 53)) for n in range(50)
    ]


# ---- the kernel's own table


def conntrack(*arguments: str) -> str:
    done = subprocess.run(["conntrack", *arguments], capture_output=True, text=True, timeout=10, check=False)
    return done.stdout


def insert(asked: str, port: int, answered_from: int, sport: int, tcp_state: str = "") -> None:
    """Insert a UDP flow, or a connection in *tcp_state*, which is not translated where *answered_from* is *port*."""
    client, node = ("fd00:50::2", "fd00:50::1") if ":" in asked else ("192.168.50.2", "192.168.50.1")
    if tcp_state and answered_from == port:
        node = asked
    kind = ["-p", "tcp", "--state", tcp_state] if tcp_state else ["-p", "udp"]
    there = ["-s", client, "-d", asked, "--sport", str(sport), "--dport", str(port)]
    back = ["-r", node, "-q", client, "--reply-port-src", str(answered_from), "--reply-port-dst", str(sport)]
    subprocess.run(["conntrack", "-I", *kind, "-t", "100", *there, *back], capture_output=True, timeout=10, check=True)


@pytest.fixture
def flows() -> Iterator[None]:
    """Flows to DNS through port 10001, and some other flows, in this private namespace."""
    conntrack("-F")
    for sport in (4_001, 4_002):
        insert("10.96.0.10", 53, 10_001, sport)
        insert("fd00:96::10", 53, 10_001, sport)
    insert("192.168.50.1", 30_053, 10_001, 4_003)
    insert("8.8.8.8", 53, 53, 4_004)
    yield
    conntrack("-F")


def asked_for() -> set[tuple[str, str]]:
    """Return the dialled (address, port) of all entries in conntrack."""
    known = set()
    for family in ("ipv4", "ipv6"):
        for line in conntrack("-L", "-p", "udp", "-f", family).splitlines():
            words = [word.partition("=") for word in line.split()]
            first = {key: value for key, _, value in reversed(words) if key in ("dst", "dport")}
            known.add((first["dst"], first["dport"]))
    return known


OTHERS = {("192.168.50.1", "30053"), ("8.8.8.8", "53")}


@pytest.mark.usefixtures("flows")
async def test_flows_to_a_changed_portal_are_forgotten_and_no_others() -> None:
    await forget_udp_flows({DNS: by(10_002)})

    assert asked_for() == {*OTHERS, ("fd00:96::10", "53")}


@pytest.mark.usefixtures("flows")
async def test_as_many_as_there_are_are_forgotten_with_those_that_ended_meanwhile() -> None:
    for sport in range(5_000, 5_600):
        insert("10.96.0.10", 53, 10_001, sport)
    ended = [Flow(("192.168.50.2", sport), ("10.96.0.11", 53)) for sport in range(20)]
    known = [Flow(("192.168.50.2", sport), ("10.96.0.10", 53)) for sport in (4_001, 4_002, *range(5_000, 5_600))]

    assert delete_flows(L4Protocol.UDP, [*ended, *known]) == len(known)
    assert asked_for() == {*OTHERS, ("fd00:96::10", "53")}


@pytest.mark.usefixtures("flows")
async def test_both_families_are_looked_at() -> None:
    await forget_udp_flows({DNS: by(10_002), DNS6: set(), NODE_PORT: by(10_002)})

    assert asked_for() == {("8.8.8.8", "53")}


@pytest.mark.usefixtures("flows")
async def test_flows_to_the_right_endpoint_stay() -> None:
    before = asked_for()

    await forget_udp_flows({DNS: by(10_001), DNS6: by(10_001), NODE_PORT: by(10_001)})

    assert asked_for() == before


@pytest.mark.usefixtures("flows")
async def test_only_flows_to_removed_endpoints_of_a_portal_are_deleted() -> None:
    insert("10.96.0.10", 53, 5_353, 4_009)

    await forget_udp_flows({DNS: frozenset({("192.168.50.1", 5_353)})})

    left = [line for line in conntrack("-L", "-p", "udp").splitlines() if "dst=10.96.0.10" in line]
    assert len(left) == 1
    assert "sport=4009" in left[0]


async def test_where_there_are_no_flows_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    await forget_udp_flows({DNS: by(10_002), DNS6: by(10_002), NODE_PORT: set()})

    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def listed(
    protocol: L4Protocol, family: Family, state: TcpState | None = None
) -> set[tuple[str, int, str, int, str, int]]:
    return {
        (ip_text(e.source), e.source_port, ip_text(e.asked), e.asked_port, ip_text(e.answering), e.answering_port)
        for e in read_entries(protocol, family, state)
    }


@pytest.mark.usefixtures("flows")
def test_the_kernels_entries_are_read_by_protocol_family_and_state() -> None:
    for sport in range(5_000, 5_600):  # more than one datagram of the kernel
        insert("fd00:96::10", 53, 10_001, sport)
    insert("10.96.0.1", 80, 10_001, 4_005, "ESTABLISHED")
    insert("10.96.0.1", 80, 80, 4_006, "SYN_SENT")
    zoned = ["-s", "192.168.50.2", "-d", "10.96.0.1", "--orig-zone", "5", "--sport", "4007", "--dport", "80"]
    zoned += ["-r", "10.1.0.1", "-q", "192.168.50.2", "--reply-port-src", "8080", "--reply-port-dst", "4007"]
    command = ["conntrack", "-I", "-p", "tcp", "--state", "ESTABLISHED", "-t", "100", *zoned]
    subprocess.run(command, capture_output=True, timeout=10, check=True)
    ping = ["-p", "icmp", "-s", "192.168.50.2", "-d", "10.96.0.1", "--icmp-type", "8", "--icmp-code", "0"]
    command = ["conntrack", "-I", *ping, "--icmp-id", "80", "-t", "100"]
    subprocess.run(command, capture_output=True, timeout=10, check=True)

    client = "192.168.50.2"
    assert listed(L4Protocol.TCP, 4, TcpState.ESTABLISHED) == {
        (client, 4_005, "10.96.0.1", 80, "192.168.50.1", 10_001),
        (client, 4_007, "10.96.0.1", 80, "10.1.0.1", 8_080),
    }
    assert listed(L4Protocol.TCP, 4, TcpState.SYN_SENT) == {(client, 4_006, "10.96.0.1", 80, "10.96.0.1", 80)}
    assert listed(L4Protocol.TCP, 6) == set()
    assert listed(L4Protocol.UDP, 6) == {
        ("fd00:50::2", sport, "fd00:96::10", 53, "fd00:50::1", 10_001) for sport in (4_001, 4_002, *range(5_000, 5_600))
    }


# ---- connections that began before their portal was served


@pytest.fixture
def connections() -> Iterator[None]:
    """Unanswered connections to two portals and a node port, translated ones, and one that is established."""
    conntrack("-F")
    for sport, answered_from, state in (
        (4_001, 80, "SYN_SENT"),
        (4_002, 10_001, "SYN_SENT"),
        (4_003, 80, "ESTABLISHED"),
    ):
        insert("10.96.0.1", 80, answered_from, sport, state)
    insert("10.96.0.2", 80, 80, 4_004, "SYN_SENT")
    insert("192.168.50.1", 30_080, 30_080, 4_005, "SYN_SENT")
    yield
    conntrack("-F")


@pytest.mark.usefixtures("connections")
async def test_of_connections_to_new_portals_only_untranslated_unanswered_ones_are_deleted() -> None:
    await forget_early_connections({WEB, Portal("0.0.0.0", 30_080, L4Protocol.TCP)})

    left = conntrack("-L", "-p", "tcp")
    assert {sport for sport in range(4_001, 4_006) if f"sport={sport} " in left} == {4_002, 4_003, 4_004}
