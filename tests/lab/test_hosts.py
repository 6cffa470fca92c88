"""The network of a lab stays whole while pods come and go."""

from __future__ import annotations

import socket
from pathlib import Path

from userspace_proxy.lab.hosts import Host, Lab, build_service_lab


def test_an_answer_that_a_pod_sends_after_the_end_of_another_pod_arrives(lab: Lab) -> None:
    world = build_service_lab(lab, pods=3)

    def address(pod: Host) -> str:
        return world.node.run("cat", str(Path("/sys/class/net", pod.name, "address"))).stdout

    lowest, other, _ = sorted(world.pods, key=address)  # a bridge may take the lowest address of its ports
    ip = world.pod_ip(world.pods.index(other))
    with other.inside():
        listener = socket.create_server((ip, 8080))
    with world.node.inside():
        client = socket.socket()
    with listener, client:
        client.settimeout(10)
        client.connect((ip, 8080))
        client.sendall(b"?")
        connection, _ = listener.accept()
        with connection:
            connection.recv(1)
            lab.remove(lowest)
            connection.sendall(b"!")

            assert client.recv(1) == b"!"
