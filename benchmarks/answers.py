"""Wait at most 60 s until an address answers: ``python answers.py IP PORT``.

It is a separate process, so that waiting does not disturb the measuring process.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import time

_GIVE_UP_S = 60.0
_TRY_S = 0.1


def main() -> None:
    address = (sys.argv[1], int(sys.argv[2]))
    give_up_at = time.monotonic() + _GIVE_UP_S
    while time.monotonic() < give_up_at:
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=_TRY_S) as sock:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            if sock.recv(1):
                return
        time.sleep(_TRY_S)
    sys.exit(f"{address} did not answer within {_GIVE_UP_S:.0f} s")


if __name__ == "__main__":
    main()
