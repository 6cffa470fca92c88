"""What a node knows of itself before it serves."""

from __future__ import annotations

import socket

from tests.fakes import FakeClock
from userspace_proxy.control.pools import NodePort
from userspace_proxy.runtime.node_setup import ListeningPorts


def test_one_look_at_the_listening_ports_serves_all_services_of_a_sync(clock: FakeClock) -> None:
    listening = ListeningPorts(clock)
    before = listening()

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = NodePort("TCP", server.getsockname()[1])
        assert listening() is before

        clock.now_s += 0.2
        assert port in listening()
    clock.now_s += 0.2
    assert port not in listening()
