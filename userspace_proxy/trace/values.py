"""The values of a trace: packets, hooks, chains and rules. No I/O.

A `PacketTrace` has a leg for each followed packet. A `Leg` passes hooks. A hook has base chains (`Visit`), and a chain
has matching rules (`MatchedRule`).
"""

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True)
class Ends:
    """Source and destination of a packet; ports are 0 for a protocol without ports."""

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
    """Return an address and a port in the usual notation."""
    if not port:
        return ip
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


class PacketRole(Enum):
    """The role of a traced packet, which is the reason why it was traced."""

    CLIENT = "client"  # the first packet of a client's connection
    DIAL = "dial"  # the first packet of the proxy's own connection to a backend
    REPLY = "reply"  # the first packet that comes back from there
    ANSWER = "answer"  # the first packet that comes back to the client


@dataclass(frozen=True, slots=True)
class MatchedRule:
    """One rule that matched, and the number of rules ``skipped`` before it in the same chain.

    ``rule``: its text in nft's or iptables' syntax. ``element``: the map element it looked up for this packet.
    ``verdict``: continue, jump, goto, return, accept or drop. ``to``: the target of a jump.
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
    """One base chain at a hook, and its effect on the packet.

    ``end``: accept or drop. ``by_policy``: no rule decided. ``skipped``: rules that did not match after the last step,
    in all chains passed.
    """

    family: str
    table: str
    chain: str
    kind: str
    steps: tuple[MatchedRule, ...]
    end: str
    by_policy: bool
    skipped: int
    before: Ends
    after: Ends | None


@dataclass(frozen=True, slots=True)
class Hook:
    """One hook of the kernel; ``after`` is None if the packet went no further."""

    name: str
    devices: tuple[str, str]
    visits: tuple[Visit, ...]
    before: Ends
    after: Ends | None


@dataclass(frozen=True, slots=True)
class Leg:
    """One packet's path through this host.

    ``what``: the kind of packet (SYN, SYN+ACK, RST, datagram). ``answered``: for a dial, the kind of its reply.
    """

    role: PacketRole
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
    """The process that listens where the rules sent the packet."""

    pid: int
    name: str
    port: int
    is_ours: bool


@dataclass(frozen=True, slots=True)
class IpvsServer:
    """A virtual server of IPVS: its portal (protocol and address), scheduler, and the weight of each real server."""

    portal: str
    scheduler: str
    weights: dict[str, int]


@dataclass(frozen=True, slots=True)
class ConntrackEntry:
    """A conntrack entry: the packets of a connection and the expected replies."""

    state: str
    original: Ends
    reply: Ends


@dataclass(frozen=True, slots=True)
class PacketTrace:
    """The trace of one packet to ``portal`` and of the packets it caused."""

    portal: str
    protocol: str
    legs: tuple[Leg, ...]
    listener: Listener | None = None
    ipvs: IpvsServer | None = None
    flow: ConntrackEntry | None = None
    outcome: str = ""
    notes: tuple[str, ...] = ()

    def leg(self, role: PacketRole) -> Leg | None:
        """Return the first leg with that *role*, or None."""
        return next((leg for leg in self.legs if leg.role is role), None)

    @property
    def dial(self) -> Leg | None:
        """The proxy's connection that serves the client: the last of its dials."""
        return next((leg for leg in reversed(self.legs) if leg.role is PacketRole.DIAL), None)
