"""What the rules of userspace mode do, in any rule language."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.routes import Sender
from userspace_proxy.model.service import Portal

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


@dataclass(frozen=True, slots=True)
class Redirects:
    """The rules of userspace mode: the proxy port for each portal, or DROPPED.

    ``exceptions``: take precedence over ``ports`` for packets of these senders. ``allowed``: the CIDRs that may dial
    these portals; packets from elsewhere are dropped. ``node_ports_on``: CIDRs of node addresses that serve node
    ports; all addresses of a family serve them if it has no CIDR here.
    ``transparent``: some listener uses its clients' addresses towards backends, so replies must be routed to this host.
    ``refuse_port``: a port without a listener. Packets to portals without endpoints go there, and the kernel refuses
    them: with a reset for TCP, with port unreachable for UDP.
    """

    ports: Mapping[Portal, int] = field(default_factory=dict)
    names: Mapping[Portal, ServicePortName] = field(default_factory=dict)
    refuse_port: int = 0
    capture: Capture = Capture.REDIRECT
    exceptions: Mapping[Sender, Mapping[Portal, int]] = field(default_factory=dict)
    allowed: Mapping[Portal, tuple[str, ...]] = field(default_factory=dict)
    node_ports_on: tuple[str, ...] = ()
    pods: PodDetector | None = None
    transparent: bool = False
