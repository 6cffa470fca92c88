"""Client loads: wrk for requests, iperf3 for bytes, and sequential clients in this process.

Each load opens its sockets on the client's host, and returns what it did and how long it took. wrk and iperf3 are
common tools, so that readers can check the figures.
"""

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from userspace_proxy.compare.nodes import BULK, SMALL, ModeNode
from userspace_proxy.errors import StartError

REQUEST = b"GET / HTTP/1.1\r\nHost: compare\r\n\r\n"
REQUEST_AND_CLOSE = b"GET / HTTP/1.0\r\n\r\n"
_TIMEOUT_S = 10
_LEAST_BULK_S = 0.4
_MORE_BULK_S = 2.0
_AGAIN_S = 0.5
_INTERRUPT_AGAIN_S = 0.5
_FAILED_SHARE = 0.01  # the maximum share of a load's requests
_SIGINT_BIT = 1 << (signal.SIGINT - 1)  # in /proc/PID/status
_WRK_SCRIPT = Path(__file__).parent / "peers" / "wrk.lua"


@dataclass(frozen=True, slots=True)
class LoadResult:
    """The result of a load: its requests, datagrams or bytes."""

    units: float
    seconds: float
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    p999_ms: float = 0.0
    failed: int = 0


class _Client:
    """A load tool on the client's host that reports when stopped; its own duration option takes whole seconds only."""

    _may_miss_interrupts = False

    def __init__(self, node: ModeNode, *command: str) -> None:
        self._tool = command[0]
        # iperf3 keeps its payload in TMPDIR; a container's default may be read-only.
        environment = {**os.environ, "TMPDIR": str(node.folder)}
        self._process = subprocess.Popen(
            node.client.command(*command), stdout=subprocess.PIPE, text=True, env=environment
        )

    def stop(self, meanwhile: Callable[[], object] = lambda: None) -> LoadResult:
        """Stop the tool and return its result; call *meanwhile* until it has ended (within 100 ms)."""
        give_up_at = time.monotonic() + _TIMEOUT_S
        while not self._heeds_interrupts() and time.monotonic() < give_up_at:
            time.sleep(0.002)
        interrupted_at = -_INTERRUPT_AGAIN_S
        while self._process.poll() is None:
            now = time.monotonic()
            if now > give_up_at:
                self.kill()
                raise StartError(f"{self._tool} does not end")
            if now >= interrupted_at + _INTERRUPT_AGAIN_S:
                self._process.send_signal(signal.SIGINT)
                interrupted_at = now if self._may_miss_interrupts else give_up_at
            meanwhile()
            time.sleep(0.002)
        return self._parse(self._process.communicate()[0])

    def _heeds_interrupts(self) -> bool:
        """Return whether the tool has its handler of SIGINT, or has ended. An earlier signal would kill it."""
        caught = re.search(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{self._process.pid}/status").read_text(), re.MULTILINE)
        return self._process.poll() is not None or (caught is not None and bool(int(caught[1], 16) & _SIGINT_BIT))

    def kill(self) -> None:
        """Kill the tool if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()

    def _parse(self, output: str) -> LoadResult:
        raise NotImplementedError


class Wrk(_Client):
    """wrk with a number of connections."""

    # An interrupt between the installation of its handler and its sleep does not end the sleep.
    _may_miss_interrupts = True

    def __init__(self, node: ModeNode, connections: int, *, close: bool = False) -> None:
        header = ["-H", "Connection: close"] if close else []
        url = f"http://{node.front_ip}:{SMALL}/"
        super().__init__(node, "wrk", "-t1", f"-c{connections}", "-d60s", "-s", str(_WRK_SCRIPT), *header, url)

    def _parse(self, output: str) -> LoadResult:
        """Parse the line that peers/wrk.lua prints: requests, microseconds, and latencies in microseconds."""
        done = re.search(r"^done (\d+) (\d+) ([\d.]+) ([\d.]+) ([\d.]+) (\d+)$", output, re.MULTILINE)
        if done is None:
            raise StartError(f"wrk said: {output.strip()}")
        requests, took_us, p50_us, p99_us, p999_us, failed = (float(word) for word in done.groups())
        return LoadResult(requests, took_us / 1e6, p50_us / 1000, p99_us / 1000, p999_us / 1000, int(failed))


class Iperf(_Client):
    """iperf3 with a number of flows, in the direction from the pod to the client."""

    def __init__(self, node: ModeNode, flows: int) -> None:
        where = ("-c", node.front_ip, "-p", str(BULK))
        super().__init__(node, "iperf3", *where, "-R", "-P", str(flows), "-t", "60", "-J")

    def _parse(self, output: str) -> LoadResult:
        """Parse the bytes received. iperf3 reports its interruption as an error; that is expected."""
        try:
            said = msgspec.json.decode(output)
            received = said["end"]["sum_received"]
            if not received["bytes"]:
                raise StartError("iperf3 was stopped before it began")
            return LoadResult(received["bytes"], received["seconds"])
        except (msgspec.DecodeError, KeyError):
            raise StartError(f"iperf3 said: {output.strip()[-500:]}") from None


def run_for(seconds: float, client: Wrk | Iperf) -> LoadResult:
    """Let *client*, just started, run for *seconds*, then stop it; it is killed on any error."""
    try:
        time.sleep(seconds)
        return client.stop()
    finally:
        client.kill()


def bulk_for(seconds: float, node: ModeNode, flows: int) -> LoadResult:
    """Run iperf3 with *flows* for *seconds*, or longer if it needs more time to begin."""
    return run_for(max(seconds, _LEAST_BULK_S), Iperf(node, flows))


def or_again(measure: Callable[[float], dict[str, float]], seconds: float) -> dict[str, float]:
    """Return the result of *measure*, which uses iperf3 for *seconds*; retry once, without the failed attempt's cost.

    The iperf3 server takes one client, and may still hold the previous one. And on a busy machine it may need longer to
    begin, so the second attempt has more time.
    """
    try:
        return measure(seconds)
    except StartError:
        time.sleep(_AGAIN_S)
        return measure(seconds + _MORE_BULK_S)


def served(done: LoadResult) -> LoadResult:
    """Return *done* if the load succeeded.

    Raises:
        StartError: nothing was answered, or too many requests failed. wrk counts error answers as requests, so a
            mode that fails fast would look fast.
    """
    if not done.units:
        raise StartError("nothing was answered")
    if done.failed > _FAILED_SHARE * done.units:
        raise StartError(f"{done.failed:,} failures at {done.units:,.0f} requests")
    return done


def one_after_another(node: ModeNode, addresses: Sequence[tuple[str, int]], seconds: float) -> list[float]:
    """Send one request to each of *addresses* in turn, for *seconds*; return the sorted durations in ms."""
    took, turn, now = [], 0, time.monotonic()
    end_at = now + seconds
    with node.client.inside():
        while now < end_at:
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
                sock.settimeout(2.0)
                started_at = time.monotonic()
                sock.connect(addresses[turn % len(addresses)])
                sock.sendall(REQUEST_AND_CLOSE)
                while sock.recv(4096):
                    pass
                now = time.monotonic()
                took.append((now - started_at) * 1000)
            turn += 1
    return sorted(took)
