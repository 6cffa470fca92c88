"""A UDP server that answers each datagram with itself: ``python echo.py PORT``. Imports nothing of the project."""

from __future__ import annotations

import socket
import sys


def main() -> None:
    buffer = bytearray(2048)
    view = memoryview(buffer)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        sock.bind(("0.0.0.0", int(sys.argv[1])))  # noqa: S104 - the pod's own namespace
        while True:
            count, client = sock.recvfrom_into(buffer)
            sock.sendto(view[:count], client)


if __name__ == "__main__":
    main()
