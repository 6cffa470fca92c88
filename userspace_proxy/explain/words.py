"""A glossary for explanations: terms of the kernel, of nft and of this project. Pure."""

import re
from collections.abc import Iterable, Mapping

from userspace_proxy.explain.lines import Line

# In the order in which a packet meets them.
WORDS: Mapping[str, str] = {
    "portal": "an address that a client dials: cluster IP, external IP, load balancer IP or node port",
    "endpoint": "the address and port of one pod that serves",
    "proxy port": "a local port at which the proxy accepts connections to a portal",
    "PREROUTING": "the kernel's hook for packets that arrive, before the routing decision",
    "INPUT": "the hook for packets to this node itself, after the routing decision",
    "FORWARD": "the hook for packets that only pass through this node",
    "OUTPUT": "the hook for packets that processes of this node send",
    "POSTROUTING": "the hook for packets that are about to leave",
    "conntrack": "the kernel's list of connections and their translations; NAT rules see only first packets",
    "NAT": "network address translation: another destination (DNAT) or another sender (SNAT) is written into a packet",
    "DNAT": "the destination is replaced; conntrack puts it back as the sender of all answers",
    "REDIRECT": "DNAT to this node itself, at another port (nft: redirect)",
    "masquerade": (
        "SNAT with this node's own address: the endpoint answers to this node, which hands it on to the client"
    ),
    "mark": "a number that a packet carries inside this kernel, from one rule to the next; it is never sent",
    "priority": "of a packet: another such number, for traffic shaping; of a chain: its place in the order at its hook",
    "affinity": "a client is led to the same endpoint again (sessionAffinity: ClientIP)",
    "pin": "an entry for affinity: a client, its endpoint, and when it expires",
    "virtual server": "a portal in ipvs, the kernel's load balancer",
}
_FOUND = {word: re.compile(rf"\b{re.escape(word)}s?\b") for word in WORDS}
_FOUND["NAT"] = re.compile(r"\b[DS]?NAT\b|\bnat\b")
_FOUND["DNAT"] = re.compile(r"\bDNAT\b|\bdnat\b")
_FOUND["REDIRECT"] = re.compile(r"\bREDIRECT\b|\bredirect to\b")
_FOUND["masquerade"] = re.compile(r"\bmasquerade\b|\bMASQUERADE\b")


def words_in(lines: Iterable[Line]) -> dict[str, str]:
    """Return the words that *lines* use, and what they mean."""
    text = "\n".join(f"{line.text}\n{line.explanation}" for line in lines)
    return {word: meaning for word, meaning in WORDS.items() if _FOUND[word].search(text)}
