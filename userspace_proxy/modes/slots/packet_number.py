"""The number that a packet carries in its priority: what its bits say. Pure."""

MASQUERADED = 0x8000_0000
OURS = 0x4000_0000  # so that we find our own numbers when the packet leaves
PINNED = 0x2000_0000
ENDPOINT_SET = 0x5FFF_F000  # the number of the endpoint set, without what is to be done first
SEAT = 0xFFF  # of the endpoint in it, 0 for none
REJECTED, DROPPED = 1, 2
# Sent by this node to itself: rejected at INPUT. Only a process with CAP_NET_ADMIN could give a packet this priority.
REJECTED_AT_INPUT = 0x1000_0001
