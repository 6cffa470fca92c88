#!/usr/bin/env python3
"""Backends for the lessons: addresses on this host's ``lo`` that answer each request with ``address:port``.

Without arguments, these are the three Pods of the lessons. The addresses are removed at the end.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseRequestHandler, ThreadingUDPServer

POD_IPS = ["10.244.0.2", "10.244.0.3", "10.244.0.4"]
HTTP_PORTS = [8080, 8081, 9090]
PROXIED_PORT = 8082  # expects a PROXY header, version 1, and repeats it in the answer
UDP_PORT = 9000


class HttpAnswer(BaseHTTPRequestHandler):
    said_before: tuple[str, ...] = ()

    def do_GET(self) -> None:
        ip, port = self.connection.getsockname()
        body = " ".join([f"{ip}:{port}", *self.said_before]).encode() + b"\n"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *_: object) -> None:  # noqa: A002 - the base class calls it so
        """Say nothing: the lesson is on the client's side."""


class ProxiedAnswer(HttpAnswer):
    def handle(self) -> None:
        self.said_before = (self.rfile.readline().decode().strip(),)
        super().handle()


class UdpAnswer(BaseRequestHandler):
    def handle(self) -> None:
        sock = self.request[1]
        ip, port = sock.getsockname()
        sock.sendto(f"{ip}:{port}\n".encode(), self.client_address)


def main() -> None:
    ips = sys.argv[1:] or POD_IPS
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    held: list[str] = []
    try:
        for ip in ips:
            subprocess.run(["ip", "address", "replace", f"{ip}/32", "dev", "lo"], check=True)
            held.append(ip)
            servers = [
                *(ThreadingHTTPServer((ip, port), HttpAnswer) for port in HTTP_PORTS),
                ThreadingHTTPServer((ip, PROXIED_PORT), ProxiedAnswer),
                ThreadingUDPServer((ip, UDP_PORT), UdpAnswer),
            ]
            for server in servers:
                threading.Thread(target=server.serve_forever, daemon=True).start()
        sys.stdout.write(f"answering at {', '.join(held)}: HTTP {HTTP_PORTS}, UDP {UDP_PORT}; Ctrl-C ends it\n")
        sys.stdout.flush()
        signal.pause()
    except KeyboardInterrupt:
        pass
    except subprocess.CalledProcessError:
        sys.exit("addresses can be added by root only, or in a network of your own: see examples/README.md")
    finally:
        for ip in held:
            subprocess.run(["ip", "address", "del", f"{ip}/32", "dev", "lo"], check=True)


if __name__ == "__main__":
    main()
