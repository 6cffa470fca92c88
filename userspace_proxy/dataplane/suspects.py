"""Endpoints that accepted a connection and then reset it before they sent a byte.

A dial to such an endpoint succeeds. A client that has not sent a byte can be connected to
another endpoint; one that has sent some cannot, because a request must not arrive twice. So the first such reset makes
the endpoint a suspect, and the next connections wait for PROOF_S before they send it a byte. A suspect that resets one
of them within this time has failed its dial. A byte from the endpoint over a later connection clears it of suspicion.
An older connection proves nothing: it may have ended with the endpoint's process, long after its last byte.
"""

from userspace_proxy.model.endpoint import Address

PROOF_S = 0.1
# An endpoint that resets later than PROOF_S is ejected after this number of such connections in a row.
RESETS_MAX = 3


class Suspects(dict[Address, tuple[int, float]]):
    """The suspects of one service port: how many connections in a row each has reset, and when it did so last."""

    __slots__ = ()

    def note_reset(self, address: Address, now: float) -> bool:
        """Count a reset by *address*. Return whether it has failed as often as justifies an ejection."""
        count = self.get(address, (0, now))[0] + 1
        self[address] = count, now
        return count >= RESETS_MAX

    def note_answer(self, address: Address, started_at: float) -> None:
        """Note that *address* sent a byte. Clear it of suspicion if that connection began after its last reset."""
        if address in self and self[address][1] <= started_at:
            del self[address]
