"""What the nftables tables of several modes have in common, line by line. Pure."""

from __future__ import annotations

import re

from userspace_proxy.modes.reasons.lines import patterns
from userspace_proxy.netfilter.nft_text import FORWARD_HOOK, NO_LOOP

# By how the name of a set or a map ends: whose packets are meant.
SENDERS = {"_for_pods": " sent by pods", "_for_node": " sent by this node itself", "": ""}

FRAME = patterns(
    (r"type inet_proto \. inet_service", "An element is protocol . port."),
    (r"type ipv[46]_addr \. inet_proto \. inet_service", "An element is address . protocol . port."),
    (r"chain prerouting \{", "PREROUTING: what comes in by the network (from other hosts, and from this node's pods)."),
    (r"chain output \{", "OUTPUT: what processes of this node itself send; this never passes PREROUTING."),
    (r"chain input \{", "INPUT: what is for this node itself."),
    (r"chain forward \{", "FORWARD: what passes through this node."),
    (re.escape(FORWARD_HOOK), "Called for every packet that passes through."),
    (r"chain node_ports[46] \{", "Packets to an address of this node: is it a node port?"),
    (r"set restricted[46] \{", "Portals that not everybody may dial (loadBalancerSourceRanges)."),
)
RULES = patterns(
    (
        re.escape(NO_LOOP),
        "A packet to a cluster IP that nobody serves, about to leave by lo, where a node without a default route sends "
        "it: it would come in again, round after round, until its TTL is used up. Its sender is told that nobody is "
        "there.",
    ),
)


def who(text: str | None) -> str:
    """Return who is matched by the beginning of a rule."""
    text = (text or "").strip()
    if not text:
        return ""
    if text.startswith("fib saddr"):
        return "sent by this node itself"
    inside = text.partition(" { ")[2].removesuffix(" }")
    return f"sent from {inside} (pods)" if inside else f"that come in by {text.split()[1]} (pods)"
