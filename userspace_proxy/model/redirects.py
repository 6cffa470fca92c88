"""How rules capture packets to portals, and tell packets of pods and of this proxy from others."""

from dataclasses import dataclass
from enum import Enum

# Mark on our packets to backends; the rules skip them. One bit, used neither by kube-proxy (0x4000, 0x8000) nor by
# Cilium (0x0f00) or Calico (0xffff0000).
OWN_MARK = 0x2000
# With OWN_MARK: our packets that carry a client's address. Alone: the replies of backends to these.
TRANSPARENT_MARK = 0x1000


class Capture(Enum):
    """How packets to a portal reach the proxy port.

    REDIRECT: at the address of the incoming interface. ADDRESS: by DNAT to an address on ``lo``.
    """

    REDIRECT = "redirect"
    ADDRESS = "address"


@dataclass(frozen=True, slots=True)
class PodDetector:
    """Tells whether a packet comes from a pod: its source is in one of ``cidrs``, or it arrives at ``interface``.

    ``interface`` is a name, or a prefix of names if it ends with ``*``. One of the two fields is set.
    """

    cidrs: tuple[str, ...] = ()
    interface: str = ""


# Value in place of a proxy port: packets are dropped.
DROPPED = 0
