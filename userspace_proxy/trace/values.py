"""What is known of a packet's way, as values: nothing here reads, asks or draws.

A `Story` has a leg for each packet that was followed. A `Leg` goes through hooks, at each hook through the
base chains that stand there (`Visit`), in each chain from rule to rule (`Step`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True)
class Ends:
    """From where to where a packet goes; ports are 0 where a protocol has none."""

    source: str
    source_port: int
    destination: str
    destination_port: int

    @property
    def sender(self) -> str:
        return at(self.source, self.source_port)

    @property
    def receiver(self) -> str:
        return at(self.destination, self.destination_port)

    def __str__(self) -> str:
        return f"{self.sender} -> {self.receiver}"


def at(ip: str, port: int) -> str:
    """Return an address and a port as people write them."""
    if not port:
        return ip
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


class Role(Enum):
    """Why a packet was followed."""

    CLIENT = "client"  # the first packet of a client's connection
    DIAL = "dial"  # the first packet of the proxy's own connection to a backend
    REPLY = "reply"  # the first packet that comes back from there
    ANSWER = "answer"  # the first packet that comes back to the client


@dataclass(frozen=True, slots=True)
class Step:
    """One rule that matched, and ``skipped`` before it in the same chain that did not.

    ``rule`` is its text in the words of the language it was written in; ``element`` what a map that it asks
    has for this packet. ``verdict`` is continue, jump, goto, return, accept or drop; ``to`` where a jump leads.
    """

    chain: str
    rule: str
    verdict: str
    to: str = ""
    skipped: int = 0
    element: str = ""
    depth: int = 0


@dataclass(frozen=True, slots=True)
class Visit:
    """One base chain at a hook, and what became of the packet there.

    ``end`` is accept or drop; ``by_policy`` where no rule decided. ``skipped`` counts the rules that did not
    match after the last step, wherever the packet came by.
    """

    family: str
    table: str
    chain: str
    kind: str
    steps: tuple[Step, ...]
    end: str
    by_policy: bool
    skipped: int
    before: Ends
    after: Ends | None


@dataclass(frozen=True, slots=True)
class Hook:
    """One place in the kernel where packets meet rules; ``after`` is None for a packet that went no further."""

    name: str
    devices: tuple[str, str]
    visits: tuple[Visit, ...]
    before: Ends
    after: Ends | None


@dataclass(frozen=True, slots=True)
class Leg:
    """One packet's way through this host; ``what`` says which packet it is: SYN, SYN+ACK, RST, a datagram.

    ``answered``: what came back, of a dial.
    """

    role: Role
    what: str
    hooks: tuple[Hook, ...]
    answered: str = ""

    @property
    def first(self) -> Ends:
        return self.hooks[0].before

    @property
    def last(self) -> Ends:
        return self.hooks[-1].after or self.hooks[-1].before


@dataclass(frozen=True, slots=True)
class Listener:
    """The process that has a socket where the rules led to."""

    pid: int
    name: str
    port: int
    is_ours: bool


@dataclass(frozen=True, slots=True)
class VirtualServer:
    """A portal as IPVS knows it, with its real servers (address and port, forwarding method, weight)."""

    protocol: str
    ip: str
    port: int
    scheduler: str
    real_servers: tuple[RealServer, ...]


@dataclass(frozen=True, slots=True)
class RealServer:
    ip: str
    port: int
    forwarding: str
    weight: int


@dataclass(frozen=True, slots=True)
class Flow:
    """What conntrack remembers: the packets of a connection, and those that it expects to come back."""

    state: str
    original: Ends
    reply: Ends


@dataclass(frozen=True, slots=True)
class Story:
    """All that was seen of one packet to ``portal``, and of what followed from it."""

    portal: str
    protocol: str
    legs: tuple[Leg, ...]
    listener: Listener | None = None
    ipvs: VirtualServer | None = None
    flow: Flow | None = None
    outcome: str = ""
    notes: tuple[str, ...] = ()

    def leg(self, role: Role) -> Leg | None:
        """Return the first leg in that *role*."""
        return next((leg for leg in self.legs if leg.role is role), None)

    @property
    def dial(self) -> Leg | None:
        """The proxy's own connection that serves the client: of several dials the last."""
        return next((leg for leg in reversed(self.legs) if leg.role is Role.DIAL), None)
