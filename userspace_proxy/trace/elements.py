"""The set and map elements that rules look up by a packet's own fields. Pure."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from userspace_proxy.trace.values import Ends

_LOOKUP = re.compile(r"(ip6? daddr \. )?meta l4proto \. th dport (?:map )?@(\w+)")


class Element(NamedTuple):
    """A set or map element that a rule looks up for a packet."""

    family: str
    table: str
    name: str
    key_text: str

    @property
    def key(self) -> str:
        return f"{self.family} {self.table} {self.name} {self.key_text}"


def element_of(rule: str, family: str, table: str, ends: Ends, protocol: str) -> Element | None:
    """Return the element that *rule* looks up for a packet with *ends*, or None if it looks up none."""
    found = _LOOKUP.search(rule)
    if found is None:
        return None
    port = f"{protocol} . {ends.destination_port}"
    return Element(family, table, found[2], f"{ends.destination} . {port}" if found[1] else port)


class Elements(NamedTuple):
    """The known elements of one packet's *protocol*, by `Element.key`."""

    protocol: str
    known: Mapping[str, str]

    def text(self, rule: str, family: str, table: str, ends: Ends) -> str:
        """Return the element that *rule* looks up, or "" if it looks up none or a missing one."""
        element = element_of(rule, family, table, ends, self.protocol)
        return self.known.get(element.key, "") if element is not None else ""
