"""Source hash: a client's IP address leads to a slot of Maglev's table, and the slot to an endpoint.

Every process and every node has the same table. An endpoint that is added or removed moves few other clients. While an
endpoint is ejected, its clients go to the endpoints of the following slots, and no other client moves.
"""

import struct
from collections.abc import Mapping, Sequence
from hashlib import blake2b

from userspace_proxy.dataplane.balancing.balancer import Candidates, Member, first_from
from userspace_proxy.model.maglev import slot_table

# From 10 to 9 endpoints, 1024 slots move 2 % of the other clients.
_SLOTS_MIN = 1_024
_SLOTS_PER_ENDPOINT = 16
# The table of 1,000 endpoints takes 8 ms; of more, each has two slots at least.
_SLOTS_MAX = 4_096
_FOLLOWING_MAX = 64


class SourceHash:
    """Chooses by Maglev's table, which is made on first use, not when endpoints change."""

    why = "source hash"

    def __init__(self) -> None:
        self._members: Sequence[Member] = ()
        self._table: list[int] | None = None

    def replace(self, members: Sequence[Member]) -> None:
        self._members = members
        self._table = None

    def pick(self, client_ip: str) -> int:
        table = self._table or self._make_table()
        return table[_hash(client_ip)[0] % len(table)]

    def pick_among(self, client_ip: str, candidates: Candidates) -> int:
        """Return the endpoint of the first slot from the client's on that is a candidate.

        An endpoint in slow start gets the same part of its clients for every connection, and the part only grows.
        """
        table = self._table or self._make_table()
        slot, draw = _hash(client_ip)
        bits = candidates.admitted(draw / 2**32)
        for at in range(slot, slot + _FOLLOWING_MAX):
            if bits >> (index := table[at % len(table)]) & 1:
                return index
        return first_from(bits, slot % len(self._members))

    def odds(self, client_ip: str, candidates: Candidates) -> Mapping[int, float]:
        return {self.pick_among(client_ip, candidates): 1.0}

    def _make_table(self) -> list[int]:
        members = self._members
        index_of = {member.address: index for index, member in enumerate(members)}
        # The same order everywhere: if two endpoints want one slot, the first has it.
        ordered = sorted(index_of)
        weights = {member.address[0]: member.weight for member in members}
        wanted = max(_SLOTS_MIN, min(_SLOTS_PER_ENDPOINT * len(members), _SLOTS_MAX), 2 * len(members))
        self._table = [index_of[of] for of in slot_table(ordered, 1 << (wanted - 1).bit_length(), weights)]
        return self._table


def _hash(client_ip: str) -> tuple[int, int]:
    """Return two independent numbers of 32 bits, the same in every process."""
    first, second = struct.unpack("<II", blake2b(client_ip.encode(), digest_size=8).digest())
    return first, second
