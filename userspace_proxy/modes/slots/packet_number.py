"""The bits of the number that a packet carries in its priority. Pure."""

MASQUERADED = 0x8000_0000
OURS = 0x4000_0000  # marks our numbers, which are cleared when the packet leaves
PINNED = 0x2000_0000
ENDPOINT_SET = 0x5FFF_F000  # the number of the endpoint set, without the bits for masquerading and affinity
ENDPOINT = 0xFFF  # the number of the endpoint in its set, 0 for none
REJECTED, DROPPED = 1, 2
# Sent by this node to itself: rejected at INPUT. Only a process with CAP_NET_ADMIN could give a packet this priority.
REJECTED_AT_INPUT = 0x1000_0001
