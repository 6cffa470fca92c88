"""A DNS server for tests: answers every name with 192.0.2.53, or with what its argument says.

The argument is a server to ask, or a file with the addresses of every name, one a line; without any, there is no name.
A second argument is the address to serve at.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset


def answer_to(query: dns.message.Message, addresses: list[str]) -> bytes:
    question, answer = query.question[0], dns.message.make_response(query)
    if not addresses:
        answer.set_rcode(dns.rcode.NXDOMAIN)
    elif question.rdtype == dns.rdatatype.A:
        answer.answer.append(dns.rrset.from_text(question.name, 60, "IN", "A", *addresses))
    return answer.to_wire()


with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    sock.bind((sys.argv[2] if len(sys.argv) > 2 else "0.0.0.0", 53))
    while True:
        received, client = sock.recvfrom(65_535)
        if len(sys.argv) > 1 and "/" in sys.argv[1]:
            addresses = Path(sys.argv[1]).read_text().split()
            sock.sendto(answer_to(dns.message.from_wire(received), addresses), client)
        elif len(sys.argv) > 1:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
                other.settimeout(1.0)
                other.sendto(received, (sys.argv[1], 53))
                try:
                    sock.sendto(other.recv(65_535), client)
                except OSError:
                    continue
        else:
            sock.sendto(answer_to(dns.message.from_wire(received), ["192.0.2.53"]), client)
