"""Mutants that no test can find, because they behave as the original does, each with the reason.

By module, function and change: see `mutation.Mutant.place`. A survivor that is not here is a gap in the tests.
"""

from __future__ import annotations

_DESCRIPTOR_0 = "Descriptor 0 is the standard input of every process, never a connection."

EQUIVALENT: dict[tuple[str, str, str], str] = {
    ("splice.copy", "Half.pump", "another operator in `self.splice.engine.poller.messages += 1`"): (
        "The number is only compared with itself at another time."
    ),
    (
        "splice.copy",
        "CopySplice.give_client_back",
        "another operator in `error.errno or errno.ECONNRESET`",
    ): "The error is ECONNRESET: time-outs are excluded before, and EPIPE needs an end of the backend's stream.",
    ("udp", "UdpListener.take_over", "None returned in `return False`"): "The caller only asks whether it is true.",
    ("tcp", "TcpListener.begin", "1 for 0 in `0`"): _DESCRIPTOR_0,
    ("tcp", "TcpListener.begin", "another comparison in `self.sock.fileno() >= 0`"): _DESCRIPTOR_0,
    ("tcp", "TcpListener.leave", "1 for 0 in `0`"): _DESCRIPTOR_0,
    ("tcp", "TcpListener.leave", "another comparison in `self.sock.fileno() >= 0`"): _DESCRIPTOR_0,
}
