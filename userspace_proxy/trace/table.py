"""The tracer's nftables table: it makes the kernel trace a few packets, and disappears with its process."""

import contextlib
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from string import Template

from userspace_proxy.errors import StartError
from userspace_proxy.model.redirects import OWN_MARK
from userspace_proxy.netfilter.nfnetlink import count_rules
from userspace_proxy.trace.legs import TABLE

_TIMEOUT_S = 5.0
_RULES = 8
_TEMPLATE = Path(__file__).with_suffix(".nft")


@dataclass(frozen=True, slots=True)
class PacketFilter:
    """The packet to follow: to *ip* and *port*, optionally from one client address or local port."""

    ip: str
    port: int
    protocol: str
    client_ip: str = ""
    client_port: int = 0


def commands(packet: PacketFilter) -> str:
    """Return the nft commands that create the table, one on each line."""
    is_ip6, is_tcp = ":" in packet.ip, packet.protocol == "tcp"
    ip = "ip6" if is_ip6 else "ip"
    client = f"{ip} daddr {packet.ip} {packet.protocol} dport {packet.port}"
    client += f" {ip} saddr {packet.client_ip}" if packet.client_ip else ""
    client += f" {packet.protocol} sport {packet.client_port}" if packet.client_port else ""
    asked = f"ct direction reply ct original {ip} daddr {packet.ip}"
    text = Template(_TEMPLATE.read_text()).substitute(
        table=TABLE,
        mark=f"{OWN_MARK:#x}",
        ip=ip,
        ip_type="ipv6_addr" if is_ip6 else "ipv4_addr",
        protocol=packet.protocol,
        client=client,
        first="tcp flags & (syn | ack) == syn" if is_tcp else "",
        back="tcp flags & (syn | rst) != 0" if is_tcp else "",
        answer=f"{asked} meta l4proto {packet.protocol} ct original proto-dst {packet.port}",
        unreachable=f"{asked} meta l4proto {'icmpv6' if is_ip6 else 'icmp'}",
    )
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("#"))


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
