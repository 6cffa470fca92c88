"""A DNS server for tests: answers every name with 192.0.2.53, or asks the server that it is given."""

from __future__ import annotations

import socket
import sys

import dns.message
import dns.rrset

with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.bind(("0.0.0.0", 53))
    while True:
        received, client = sock.recvfrom(65_535)
        if len(sys.argv) > 1:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
                other.settimeout(1.0)
                other.sendto(received, (sys.argv[1], 53))
                try:
                    sock.sendto(other.recv(65_535), client)
                except OSError:
                    continue
        else:
            query = dns.message.from_wire(received)
            answer = dns.message.make_response(query)
            answer.answer.append(dns.rrset.from_text(query.question[0].name, 60, "IN", "A", "192.0.2.53"))
            sock.sendto(answer.to_wire(), client)
