"""Many open connections at four workers: the user memory of each, step by step; idle CPU; their end.

Run it with `make bench-connections`. It builds its hosts in private namespaces and prints the figures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import resource
import select
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.memory import pss_kib
from userspace_proxy.compare.meters import children, process_cpu_s
from userspace_proxy.lab import (
    HTTP_PORT,
    Lab,
    ServiceLab,
    build_service_lab,
    enter_namespaces,
    prepare,
    service,
    start_proxy,
)

_SERVICE_IP = "10.96.0.10"
# The connections of one client all come to the same worker.
_CLIENT_IPS = [f"192.168.50.{number}" for number in range(100, 200)]
_STEPS = 4
# Opened before the first measurement: buffers, and memory that the allocator keeps.
_FIRST = 1_000
_AT_ONCE = 100
_PATIENCE_S = 10.0
_IDLE_S = 10.0
_SETTLE_S = 2.0


class Connections:
    """Connections of the client host through the proxy to servers in the pods, each with one answer."""

    def __init__(self, world: ServiceLab, number: int) -> None:
        self._world = world
        self._clients: list[socket.socket] = []
        self._servers: list[socket.socket] = []
        listeners, poll = {}, select.epoll()
        for pod in world.pods:
            with pod.inside():
                listener = socket.create_server(("0.0.0.0", HTTP_PORT), backlog=1_024)  # noqa: S104 - the pod's own
            listeners[listener.fileno()] = listener
            poll.register(listener.fileno(), select.EPOLLIN)
        while len(self._clients) < number:
            self._open(min(number - len(self._clients), _AT_ONCE), listeners, poll)
        for listener in listeners.values():
            listener.close()

    def _open(self, number: int, listeners: Mapping[int, socket.socket], poll: select.epoll) -> None:
        sources = itertools.islice(itertools.cycle(_CLIENT_IPS), number)
        with self._world.client.inside():
            clients = [socket.create_connection((_SERVICE_IP, 80), _PATIENCE_S, (ip, 0)) for ip in sources]
        for client in clients:
            client.sendall(b"?")
        for _ in clients:
            ready = poll.poll(_PATIENCE_S)
            assert ready, "no connection came to a pod in time"
            server, _ = listeners[ready[0][0]].accept()
            server.settimeout(_PATIENCE_S)
            assert server.recv(1) == b"?"
            server.sendall(b"!")
            self._servers.append(server)
        for client in clients:
            assert client.recv(1) == b"!"
        self._clients += clients

    def all_answer(self) -> bool:
        """Return whether a byte of each client arrives at a server."""
        for client in self._clients:
            client.sendall(b"?")
        return all(server.recv(1) == b"?" for server in self._servers)


class Holder:
    """A process that holds connections: one alone may not have enough descriptors."""

    def __init__(self, world: ServiceLab, number: int) -> None:
        self._pipe, there = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=_hold, args=(world, number, there), daemon=True)
        process.start()
        there.close()  # if it fails, the pipe ends
        self._pipe.recv()

    def all_answer(self) -> bool:
        self._pipe.send(None)
        return bool(self._pipe.recv())

    def close(self) -> None:
        self._pipe.send(None)


def _hold(world: ServiceLab, number: int, parent: Connection) -> None:
    held = Connections(world, number)
    parent.send(None)
    parent.recv()
    parent.send(held.all_answer())
    parent.recv()


def measure(world: ServiceLab, folder: Path, connections: int) -> dict[str, Any]:
    manifest = folder / "web.yaml"
    manifest.write_text(service("web", _SERVICE_IP, [world.pod_ip(0), world.pod_ip(1)]))
    proxy = start_proxy(world.node, manifest, folder / "log", "--workers", "4")
    pids = [proxy.pid, *children(proxy.pid)]
    holders = [Holder(world, _FIRST)]
    kib, steps = [pss_kib(pids)], [(connections - _FIRST) // _STEPS] * _STEPS
    for step in steps:
        holders.append(Holder(world, step))
        kib.append(pss_kib(pids))
    cpu_s = process_cpu_s(pids)
    time.sleep(_IDLE_S)
    cpu_s = process_cpu_s(pids) - cpu_s
    assert all(holder.all_answer() for holder in holders)
    for holder in holders:
        holder.close()
    time.sleep(_SETTLE_S)
    kib.append(pss_kib(pids))
    proxy.send_signal(signal.SIGTERM)
    proxy.wait(60)
    return {
        "connections": _FIRST + sum(steps),
        "workers": len(pids) - 1,
        "kib_per_connection": _growth(kib, steps),
        "pss_mb": round(kib[-2] / 1024, 1),
        "pss_after_they_ended_mb": round(kib[-1] / 1024, 1),
        "idle_cpu_percent": round(cpu_s / _IDLE_S * 100, 2),
    }


def _growth(kib: Sequence[int], steps: Sequence[int]) -> list[float]:
    """Return the memory of each connection, step by step."""
    return [round((after - before) / step, 2) for before, after, step in zip(kib, kib[1:], steps, strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--connections", type=int, default=30_000)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.connections < 2 * _FIRST:
        parser.error(f"--connections: at least {2 * _FIRST}")
    enter_namespaces(sys.argv[1:], {}, module="benchmarks.connections")
    prepare()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if (needed := 2 * (arguments.connections // _STEPS) + 100) > most:
        sys.exit(f"a process needs {needed} descriptors, and may have {most}: give fewer --connections")
    with tempfile.TemporaryDirectory() as folder, Lab() as lab:
        world = build_service_lab(lab, pods=2)
        world.client.add_addresses("eth0", *_CLIENT_IPS)
        figures = measure(world, Path(folder), arguments.connections)
    if arguments.json:
        print(json.dumps(figures, indent=2))
        return
    for figure, value in figures.items():
        print(f"{figure:24} {value!s:>24}")


if __name__ == "__main__":
    main()
