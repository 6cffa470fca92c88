"""The `trace` command: parses its arguments, follows a packet, and prints a tree or JSON, or writes a drawing."""

import ipaddress
import signal
from collections.abc import Callable
from pathlib import Path

import msgspec
from rich.console import Console

from userspace_proxy.errors import StartError
from userspace_proxy.trace.analysis import Recording, analyse
from userspace_proxy.trace.text import show
from userspace_proxy.trace.tracer import TraceRequest, follow

_UNBOUNDED = 10_000  # columns: lines in a pipe are not wrapped
_NETNS_FOLDER = Path("/run/netns")


def request(portal: str, *, wait: bool, timeout_s: float, client_ip: str, from_pod: str | None) -> TraceRequest:
    """Return the request that the command line states. Raises ValueError with the fault in it."""
    if from_pod and (wait or client_ip):
        raise ValueError("--from-pod sends the packet itself: it goes with neither --wait nor --from")
    address, port, protocol = _portal(portal)
    return TraceRequest(
        ip=str(address),
        port=port,
        protocol=protocol,
        awaited_s=timeout_s if wait or client_ip else 0.0,
        client_ip=_client(client_ip, address.version) if client_ip else "",
        namespace=_namespace(from_pod) if from_pod else None,
    )


def _portal(text: str) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int, str]:
    """Return address, port and protocol of ``IP:PORT[/PROTOCOL]``."""
    address, _, protocol = text.partition("/")
    ip, _, port = address.rpartition(":")
    if protocol.lower() not in ("", "tcp", "udp"):
        raise ValueError(f"{protocol!r} is neither tcp nor udp")
    try:
        found, number = _address(ip.strip("[]")), int(port)
    except ValueError:
        raise ValueError(f"{text!r} is no portal; write 10.96.0.11:80, 10.96.0.53:53/udp or [fd00::1]:80") from None
    if not 0 < number < 1 << 16:
        raise ValueError(f"{number} is no port; ports are 1 to 65535")
    return found, number, protocol.lower() or "tcp"


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    if "%" in text:  # any text may follow the %, and it would end up in a rule
        raise ValueError(f"{text!r} has a zone")
    return ipaddress.ip_address(text)


def _client(text: str, family: int) -> str:
    try:
        address = _address(text)
    except ValueError:
        raise ValueError(f"--from {text!r} is no address") from None
    if address.version != family:
        raise ValueError(f"--from {text}: a client of that family cannot ask an IPv{family} portal")
    return str(address)


def _namespace(text: str) -> Path:
    """Return the network namespace of a process (by its id), or a named one of `ip netns`."""
    path = Path(f"/proc/{text}/ns/net") if text.isdigit() else _NETNS_FOLDER / text
    if not path.exists():
        raise ValueError(f"--from-pod: there is no {'process' if text.isdigit() else 'network namespace'} {text}")
    return path


def run(request: TraceRequest, *, as_json: bool, svg: Path | None, wide: bool, say: Callable[[str], None]) -> None:
    """Follow a packet and show its path.

    Raises:
        StartError: packets cannot be traced here, or the file cannot be written.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the nftables table is always removed
    try:
        recording = follow(request, on_ready=lambda: _say_what_is_awaited(request, say))
    except KeyboardInterrupt:
        raise StartError("stopped") from None
    _show(recording, as_json=as_json, svg=svg, wide=wide)


def _say_what_is_awaited(request: TraceRequest, say: Callable[[str], None]) -> None:
    if request.awaited_s:
        sender = f"from {request.client_ip} " if request.client_ip else ""
        what = f"next {request.protocol.upper()} packet {sender}to {request.ip} port {request.port}"
        say(f"waiting {request.awaited_s:g} s for the {what}; Ctrl-C ends that")


def _show(recording: Recording, *, as_json: bool, svg: Path | None, wide: bool) -> None:
    trace = analyse(recording)
    if not trace.legs:
        raise StartError(trace.outcome)
    if svg is not None:
        from userspace_proxy.trace.svg import drawing

        try:
            svg.write_text(drawing(trace, wide=wide))
        except OSError as error:
            raise StartError(f"{svg}: {error.strerror}") from None
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(trace)).decode())  # noqa: T201 - this is the output
    else:
        console = Console(highlight=False)
        show(trace, console if console.is_terminal else Console(highlight=False, width=_UNBOUNDED))
