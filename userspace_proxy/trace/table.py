"""The tracer's nftables table: it makes the kernel trace a few packets, and disappears with its process."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

from userspace_proxy.errors import StartError
from userspace_proxy.model.redirects import OWN_MARK
from userspace_proxy.netfilter.nfnetlink import count_rules
from userspace_proxy.trace.legs import AFTER, AT, TABLE

_HOOKS = ("prerouting", "input", "forward", "output", "postrouting")
_TIMEOUT_S = 5.0
# Priorities: before every other rule (iptables' raw table is at -300). Answers are recognised only after conntrack
# (-200). IPVS takes packets at 98.
_FIRST, _AFTER_CONNTRACK, _BEFORE_IPVS, _LAST = -350, -199, 90, 300
_DIALS, _ANSWERS = 4, 16
_RULES = 8
# The one key that the set `begun` can have. After a match of l4proto with a set, nft 1.1 refuses matches of ports.
_ONE = "meta mark and 0x0"


@dataclass(frozen=True, slots=True)
class PacketFilter:
    """The packet to follow: to *ip* and *port*, optionally from one client address or local port."""

    ip: str
    port: int
    protocol: str
    client_ip: str = ""
    client_port: int = 0


def commands(packet: PacketFilter) -> str:
    """Return the nft commands that create the table, one on each line.

    Each rule traces a few packets and then none for a day. The proxy's dials (recognised by its packet mark) and their
    replies are traced only after a client's packet arrived; the sets record that.
    """
    ip = "ip6" if ":" in packet.ip else "ip"
    tcp = packet.protocol == "tcp"
    match = [f"{ip} daddr {packet.ip} {packet.protocol} dport {packet.port}"]
    if packet.client_ip:
        match.append(f"{ip} saddr {packet.client_ip}")
    if packet.client_port:
        match.append(f"{packet.protocol} sport {packet.client_port}")
    first = "tcp flags & (syn | ack) == syn" if tcp else ""
    client = f"{' '.join(match)} {first} {_few(1)} add @begun {{ {_ONE} }} meta nftrace set 1"
    back = "tcp flags & (syn | rst) != 0" if tcp else ""
    ours = f"meta mark & {OWN_MARK:#x} == {OWN_MARK:#x} {_ONE} @begun {first} {_few(_DIALS)}"
    ends = f"{{ {ip} daddr . {packet.protocol} dport . {packet.protocol} sport }}"
    dial = f"{ours} add @dialled {ends} meta nftrace set 1"
    dialled = f"{ip} saddr . {packet.protocol} sport . {packet.protocol} dport @dialled"
    answering = f"{'ipv6_addr' if ip == 'ip6' else 'ipv4_addr'} . inet_service . inet_service"
    reply = f"{dialled} {back} {_few(_DIALS)} meta nftrace set 1"
    # nft 1.0 needs this order to know the type of the ports.
    asked = f"ct direction reply ct original {ip} daddr {packet.ip}"
    ports = f"meta l4proto {packet.protocol} ct original proto-dst {packet.port}"
    answer = f"{asked} {ports} {back} {_few(_ANSWERS)} meta nftrace set 1"
    unreachable = f"{asked} meta l4proto {'icmpv6' if ip == 'ip6' else 'icmp'} {_few(_ANSWERS)} meta nftrace set 1"
    lines = [
        f"add table inet {TABLE} {{ flags owner; }}",
        f"add set inet {TABLE} begun {{ type mark; size 1; flags dynamic; }}",
        f"add set inet {TABLE} dialled {{ type {answering}; size {_DIALS}; flags dynamic; }}",
        *(_chain(f"{AFTER}{hook}", hook, _LAST) for hook in _HOOKS),
        _chain(f"{AT}input", "input", _BEFORE_IPVS),
        *_rules("answer_in", "prerouting", _AFTER_CONNTRACK, answer, unreachable),
        *_rules("answer_out", "output", _AFTER_CONNTRACK, answer, unreachable),
        *_rules("reply_in", "prerouting", _FIRST + 1, reply),
        *_rules("dial_out", "output", _FIRST + 1, dial),
        *_rules("client_in", "prerouting", _FIRST, client),
        *_rules("client_out", "output", _FIRST, client),
    ]
    return "".join(f"{line}\n" for line in lines)


def _few(packets: int) -> str:
    return f"limit rate 1/day burst {packets} packets"


def _chain(name: str, hook: str, priority: int) -> str:
    return f"add chain inet {TABLE} {name} {{ type filter hook {hook} priority {priority}; }}"


def _rules(name: str, hook: str, priority: int, *rules: str) -> list[str]:
    return [_chain(name, hook, priority), *(f"add rule inet {TABLE} {name} {rule}" for rule in rules)]


@contextlib.contextmanager
def tracing(nft: str, packet: PacketFilter) -> Iterator[None]:
    """Make the kernel trace *packet* during the block.

    The table belongs to the socket of a child process, which ends when its input closes. It is therefore removed even
    if this process is killed. The child has its own process group, so that Ctrl-C does not reach it.

    Raises:
        StartError: the kernel or nft refused, with the reason.
    """
    if _loaded():
        raise StartError("another trace is running here; try again when it has ended")
    command = [nft, "--interactive"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0
    ) as child:
        assert child.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(commands(packet))
                child.stdin.flush()
            _wait_until_loaded(child)
            yield
        finally:
            with contextlib.suppress(BrokenPipeError):
                child.stdin.close()
            child.wait(_TIMEOUT_S)
            _wait_until_gone()


def _wait_until_loaded(child: subprocess.Popen[str]) -> None:
    give_up_at = time.monotonic() + _TIMEOUT_S
    while _loaded() < _RULES:
        if child.poll() is not None or time.monotonic() > give_up_at:
            child.kill()
            assert child.stderr is not None
            said = next((line for line in child.stderr.read().splitlines() if "rror" in line), "nft said nothing")
            raise StartError(f"the packet cannot be traced ({said.removeprefix('Error: ')})")
        time.sleep(0.01)


def _wait_until_gone() -> None:
    """Wait for the kernel to remove the table, which happens shortly after its owner ends."""
    give_up_at = time.monotonic() + _TIMEOUT_S
    while _loaded() and time.monotonic() < give_up_at:
        time.sleep(0.01)


def _loaded() -> int:
    try:
        return count_rules(f"inet {TABLE}")
    except OSError:
        return 0
