"""Messages between the control process and the DNS process."""

import msgspec

from userspace_proxy.dataplane.begin import ChildSettings
from userspace_proxy.model.dns_names import ServiceNames
from userspace_proxy.model.names import NamespacedName

# What the DNS process runs.
MODULE = "userspace_proxy.dns.server"


class DnsSettings(ChildSettings, frozen=True):
    """Settings of the DNS process. ``upstream``: servers for other names; if None, those of ``resolv_conf``."""

    domain: str
    addresses: tuple[str, ...]
    upstream: tuple[str, ...] | None = None
    resolv_conf: str = "/etc/resolv.conf"


class Sockets(msgspec.Struct, frozen=True, tag=True):
    """The sockets to serve at; their descriptors come with it."""


class Names(msgspec.Struct, frozen=True, tag=True):
    """The names of some Services; None for a Service that was deleted."""

    services: list[tuple[NamespacedName, ServiceNames | None]]


class Synced(msgspec.Struct, frozen=True, tag=True):
    """The names of all Services that existed at the start have been sent."""


class Clients(msgspec.Struct, frozen=True, tag=True):
    """Clients that may query names outside of the cluster domain: those in *networks*, and those behind *interface*.

    *interface*: a name, or a prefix of names if it ends with ``*``; "" for none.
    """

    networks: list[str]
    interface: str = ""


class Ask(msgspec.Struct, frozen=True, tag=True):
    """Request for the counts of queries and answers."""


class EndDns(msgspec.Struct, frozen=True, tag="Close"):
    """End. Another process serves at the sockets, or cluster DNS stops."""


Request = Sockets | Names | Synced | Clients | Ask | EndDns


class Counts(msgspec.Struct, frozen=True):
    """The answer to `Ask`.

    ``requests``: by transport, IP family, type and response code. ``totals``: counters by name.
    """

    requests: list[tuple[str, str, str, str, int]] = []
    totals: dict[str, int] = {}
