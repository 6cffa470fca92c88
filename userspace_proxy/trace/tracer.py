"""Follows one packet: sends or awaits it, receives the kernel's trace messages, and looks up what they name."""

import contextlib
import errno
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from userspace_proxy.errors import StartError
from userspace_proxy.host.tool import find_tool
from userspace_proxy.lab import inside
from userspace_proxy.trace.analysis import ANSWERED, Recording, analyse, elements_in
from userspace_proxy.trace.legs import FOLLOWED, TABLE
from userspace_proxy.trace.nftrace import GROUP_NFTRACE, messages
from userspace_proxy.trace.sockets import listener_at
from userspace_proxy.trace.table import PacketFilter, tracing
from userspace_proxy.trace.values import PacketRole, PacketTrace

_NETLINK_NETFILTER, _SOL_NETLINK, _ADD_MEMBERSHIP = 12, 270, 1
_BUFFER_BYTES = 4 << 20
_DATAGRAM_BYTES = 1 << 17
_CONNECT_S, _DATAGRAM_S = 2.0, 1.0
# The trace ends this long after the last message. The limit is longer while the proxy waits for a backend, because it
# may try another one. _AT_MOST_S limits the time after the first message.
_QUIET_S, _DIAL_S, _AT_MOST_S = 0.25, 2.5, 10.0
_TOOL_TIMEOUT_S = 30.0
_LEGACY = Path("/proc/thread-self/net/ip_tables_names")
_NOTHING = b"\n"  # payload of a datagram; a server that cannot parse it stays silent


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """The packet to follow, and its sender: this command (optionally from *namespace*), or another client."""

    ip: str
    port: int
    protocol: str
    awaited_s: float = 0.0  # 0: this command sends the packet
    client_ip: str = ""
    namespace: Path | None = None


def follow(request: TraceRequest, on_ready: Callable[[], None] = lambda: None) -> Recording:
    """Trace one packet and return the recording; ``on_ready`` is called once tracing is active.

    Raises:
        StartError: this process may not trace, or lacks a tool.
    """
    nft = _tool("nft")
    recording = Recording(request.ip, request.port, request.protocol, [], "", {}, {})
    with contextlib.ExitStack() as stack:
        ear = stack.enter_context(_listening())
        probe = stack.enter_context(_socket(request)) if not request.awaited_s else None
        port = probe.getsockname()[1] if probe is not None else 0
        packet = PacketFilter(request.ip, request.port, request.protocol, request.client_ip, port)
        stack.enter_context(tracing(nft, packet))
        on_ready()
        said = _send(probe, request) if probe is not None else ""
        heard = _hear(ear, request.awaited_s)
        recording = replace(recording, datagrams=[datagram.hex() for datagram in heard], probe=said)
        return _look_up(recording, nft)


def _tool(name: str) -> str:
    path = find_tool(name)
    if path is None:
        raise StartError(f"{name} is not installed; install the package nftables")
    return path


# ---- the packet


def _socket(request: TraceRequest) -> socket.socket:
    family = socket.AF_INET6 if ":" in request.ip else socket.AF_INET
    kind = socket.SOCK_STREAM if request.protocol == "tcp" else socket.SOCK_DGRAM
    try:
        with inside(request.namespace) if request.namespace else contextlib.nullcontext():
            sock = socket.socket(family, kind)
    except OSError as error:
        raise StartError(f"no packet can be sent from {request.namespace}: {error.strerror}") from None
    sock.bind(("", 0))  # binds early: the rules need its port
    return sock


def _send(sock: socket.socket, request: TraceRequest) -> str:
    """Send the first packet; return ANSWERED, "" for no answer, or why none could be sent."""
    sock.settimeout(_CONNECT_S if request.protocol == "tcp" else _DATAGRAM_S)
    try:
        sock.connect((request.ip, request.port))
        if request.protocol == "udp":
            sock.send(_NOTHING)
            sock.recv(1)
    except (ConnectionError, TimeoutError, PermissionError):
        return ""  # trace messages have the details
    except OSError as error:
        return f"no packet left: {(error.strerror or str(error)).lower()}"
    return ANSWERED


# ---- trace messages


@contextlib.contextmanager
def _listening() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        sock.bind((0, 0))  # an unbound socket receives nothing
        try:
            sock.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, GROUP_NFTRACE)
        except PermissionError:
            raise StartError("tracing packets is not permitted; run as root or with CAP_NET_ADMIN") from None
        yield sock


def _hear(ear: socket.socket, awaited_s: float) -> list[bytes]:
    """Return the kernel's datagrams until no more arrive for the followed packets; the first may take *awaited_s*.

    Traces by other programs may mix in; they are separated later.
    """
    heard: list[bytes] = []
    dials = 0  # dials of the proxy without a reply so far
    over_at = time.monotonic() + max(awaited_s, _QUIET_S)
    give_up_at = over_at + _AT_MOST_S
    while (datagram := _receive(ear, min(over_at, give_up_at))) is not None:
        ours = [message for message in messages(datagram) if message.table == TABLE]
        if heard or ours:
            heard.append(datagram)
        if ours:
            roles = [FOLLOWED.get(message.chain) for message in ours if message.kind == "rule"]
            dials += roles.count(PacketRole.DIAL) - roles.count(PacketRole.REPLY)
            over_at = time.monotonic() + (_DIAL_S if dials > 0 else _QUIET_S)
    return heard


def _receive(ear: socket.socket, until: float) -> bytes | None:
    """Return the next datagram, b"" if messages were lost because other packets are traced too, or None at the end."""
    left_s = until - time.monotonic()
    if left_s <= 0:
        return None
    ear.settimeout(left_s)
    try:
        return ear.recv(_DATAGRAM_BYTES)
    except TimeoutError:
        return None
    except OSError as error:
        if error.errno != errno.ENOBUFS:
            raise
        return b""


# ---- look-ups


def _look_up(recording: Recording, nft: str) -> Recording:
    saved = {}
    for family, tool in (("ip", "iptables-save"), ("ip6", "ip6tables-save")):
        path = find_tool(tool)
        saved[family] = _output(path) if path else ""
    recording = replace(
        recording,
        nft=_output(nft, "--handle", "--terse", "list", "ruleset"),
        saved=saved,
        devices=dict(socket.if_nameindex()),
        ip_vs=_read(Path("/proc/thread-self/net/ip_vs")),
        notes=_notes(),
    )
    trace = analyse(recording)
    client = trace.leg(PacketRole.CLIENT)
    if client is None:
        return recording
    elements = {element.key: "" for element in elements_in(trace)}
    for element in elements_in(trace):
        where = (element.family, element.table, element.name)
        elements[element.key] = _element(_output(nft, "get", "element", *where, f"{{ {element.key_text} }}"))
    is_delivered = client.hooks[-1].name == "INPUT"
    return replace(
        recording,
        elements=elements,
        listener=listener_at(recording.protocol, client.last.destination_port) if is_delivered else None,
        conntrack=_conntrack(trace),
    )


def _element(listed: str) -> str:
    """Return the element in the output of ``nft get element``, without the map around it."""
    _, begins, rest = listed.partition("elements = { ")
    return " ".join(rest.partition(" }\n")[0].split()) if begins else ""


def _conntrack(trace: PacketTrace) -> str:
    client = trace.leg(PacketRole.CLIENT)
    path = find_tool("conntrack")
    if client is None or path is None:
        return ""
    ends = client.first
    family = "ipv6" if ":" in ends.source else "ipv4"
    filters = ["--orig-src", ends.source, "--orig-dst", ends.destination]
    return _output(path, "-L", "-f", family, "-p", trace.protocol, *filters)


def _notes() -> list[str]:
    legacy = " ".join(_read(_LEGACY).split())
    if not legacy:
        return []
    return [f"iptables-legacy has rules here, too (tables {legacy}): the kernel traces none of them"]


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_TIMEOUT_S, check=False)
    return done.stdout


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
