"""A UDP server for one pod: answers each datagram with the pod's name. Run as a script: NAME PORT."""

from __future__ import annotations

import socket
import sys


def main() -> None:
    name, port = sys.argv[1], int(sys.argv[2])
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("::", port))
        while True:
            data, client = sock.recvfrom(65_536)
            sock.sendto(f"{name} {len(data)}".encode() if data != b"who" else name.encode(), client)


if __name__ == "__main__":
    main()
