"""Endpoints that accepted a connection and then reset it before they sent a byte.

Such an endpoint passes for a healthy one when it is dialled. A client that has not sent a byte can be connected to
another endpoint; one that has sent some cannot, because a request must not arrive twice. So the first such reset makes
the endpoint a suspect, and the next connections wait for PROOF_S before they send it a byte. A suspect that resets one
of them within this time has failed its dial. A byte from the endpoint clears it of suspicion.
"""

from __future__ import annotations

from collections.abc import Collection

from userspace_proxy.model.endpoint import Address

PROOF_S = 0.1
# An endpoint that resets later than PROOF_S is ejected after this number of such connections in a row.
RESETS_MAX = 3


class Suspects(dict[Address, int]):
    """The suspects of one service port, with the number of connections in a row that they reset."""

    __slots__ = ()

    def note_reset(self, address: Address) -> bool:
        """Count a reset by *address*. Return whether it has failed as often as justifies an ejection."""
        count = self[address] = self.get(address, 0) + 1
        return count >= RESETS_MAX

    def note_answer(self, address: Address) -> None:
        """Clear *address* of suspicion: it has sent a byte."""
        self.pop(address, None)

    def forget_gone(self, known: Collection[Address]) -> None:
        """Forget all addresses but *known*."""
        for address in [address for address in self if address not in known]:
            del self[address]
