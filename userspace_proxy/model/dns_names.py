"""The addresses, ports and names that cluster DNS publishes for a Service."""

from dataclasses import dataclass
from typing import NamedTuple


class NamedPort(NamedTuple):
    """A port that has an SRV record. ``protocol`` as the API writes it."""

    name: str
    protocol: str
    number: int


class DnsHost(NamedTuple):
    """An endpoint of a headless Service. ``hostname``: the first label of its own name."""

    hostname: str
    ip: str


class HostGroup(NamedTuple):
    """Endpoints of a headless Service that have the same ports."""

    ports: tuple[NamedPort, ...]
    hosts: tuple[DnsHost, ...]


@dataclass(frozen=True, slots=True)
class ServiceNames:
    """The names of one Service: it has cluster IPs, or an external name, or is headless and has groups of endpoints.

    ``ports``: those at the cluster IPs.
    """

    cluster_ips: tuple[str, ...] = ()
    ports: tuple[NamedPort, ...] = ()
    external_name: str = ""
    groups: tuple[HostGroup, ...] = ()

    @property
    def is_headless(self) -> bool:
        return not self.cluster_ips and not self.external_name
