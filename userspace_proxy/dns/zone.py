"""The records of the cluster domain, by the Kubernetes DNS specification 1.1.0. Pure.

`Zone.find` returns a mapping from record types to values for an existing name; an empty mapping means NODATA. It
returns None for a name that does not exist: NXDOMAIN. Names are tuples of labels in lower case.
"""

import ipaddress
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from userspace_proxy.dns.messages import AAAA, CNAME, NS, PTR, SOA, SRV, TTL_S, TXT, A, Record, Srv, Values
from userspace_proxy.model.dns_names import DnsHost, HostGroup, ServiceNames
from userspace_proxy.model.endpoint import family_of
from userspace_proxy.model.names import NamespacedName

SPECIFICATION = "1.1.0"
_REFRESH_S, _RETRY_S, _EXPIRE_S = 7_200, 1_800, 86_400
_PRIORITY, _WEIGHT = 0, 100

Labels = tuple[str, ...]
_NO_VALUES: Values = {}


class Zone:
    """The names under *domain*. *addresses*: those of this server, for the record ``ns.dns``."""

    def __init__(self, domain: str, addresses: Iterable[str]) -> None:
        self.domain = domain
        self.origin: Labels = tuple(domain.split("."))
        self._own = _addresses(addresses)
        self._services: dict[Labels, ServiceNames] = {}
        self._hosts: dict[Labels, dict[str, list[str]]] = {}  # by Service and hostname, once asked for
        self._namespaces: Counter[str] = Counter()
        self._reverse: dict[Labels, dict[str, None]] = defaultdict(dict)

    def __contains__(self, name: Labels) -> bool:
        return name[-len(self.origin) :] == self.origin

    @property
    def soa(self) -> Record:
        """The record that every negative answer carries."""
        times = (1, _REFRESH_S, _RETRY_S, _EXPIRE_S, TTL_S)
        return Record(self.domain, SOA, (f"ns.dns.{self.domain}", f"hostmaster.{self.domain}", times))

    # ---- changes

    def set(self, service: NamespacedName, names: ServiceNames | None) -> Iterator[Labels]:
        """Replace the names of *service*; None removes them. Yield the names below which answers may differ."""
        key = (service.name.lower(), service.namespace.lower())
        before = self._services.pop(key, None)
        self._hosts.pop(key, None)
        if names is not None:
            self._services[key] = names
        had, has = (set(self._pointers(key, each)) for each in (before, names))
        for ip, target in had - has:
            reverse = reverse_name(ip)
            self._reverse[reverse].pop(target)
            if not self._reverse[reverse]:
                del self._reverse[reverse]
            yield reverse
        for ip, target in has - had:
            reverse = reverse_name(ip)
            self._reverse[reverse][target] = None
            yield reverse
        yield (*key, "svc", *self.origin)
        if (before is None) != (names is None):
            self._namespaces[key[1]] += -1 if names is None else 1
            yield (key[1], "svc", *self.origin)
            yield (key[1], "pod", *self.origin)

    def owner(self, name: Labels) -> Labels:
        """Return the name that `set` yields if the answer for *name* may have changed."""
        return name[-len(self.origin) - 3 :] if name in self else name

    def _pointers(self, key: Labels, names: ServiceNames | None) -> Iterator[tuple[str, str]]:
        """Yield each address of *names*, and the name that its PTR record has."""
        base = ".".join((*key, "svc", self.domain))
        if names is not None:
            yield from ((ip, base) for ip in names.cluster_ips)
            yield from ((ip, f"{hostname}.{base}") for group in names.groups for hostname, ip in group.hosts)

    # ---- look-ups

    def find(self, name: Labels) -> Values | None:
        """Return the records of *name*, or None if it does not exist."""
        if name not in self:
            targets = self._reverse.get(name)
            return None if targets is None else {PTR: list(targets)}
        match name[: -len(self.origin)]:
            case ():
                return {SOA: [self.soa.value], NS: [f"ns.dns.{self.domain}"]}
            case ("dns-version",):
                return {TXT: [SPECIFICATION]}
            case ("ns", "dns"):
                return self._own
            case ("svc",) | ("pod",) | ("dns",):
                return _NO_VALUES
            case (namespace, "svc" | "pod"):
                return _NO_VALUES if self._namespaces[namespace] > 0 else None
            case (dashed, _, "pod"):
                return _pod(dashed)
            case (*below, service, namespace, "svc"):
                return self._of_service(tuple(below), (service, namespace))
        return None

    def _of_service(self, below: Labels, key: Labels) -> Values | None:
        if (names := self._services.get(key)) is None:
            return None
        target = ".".join((*key, "svc", self.domain))
        if not below:
            if names.external_name:
                return {CNAME: [names.external_name]}
            if not names.is_headless:
                return _addresses(names.cluster_ips)
            # The specification has it so: a headless Service without ready endpoints does not exist.
            return _addresses(ip for group in names.groups for _, ip in group.hosts) or None
        match below:
            case (hostname,) if not hostname.startswith("_"):
                if key not in self._hosts:
                    self._hosts[key] = defaultdict(list)
                    for host in (host for group in names.groups for host in group.hosts):
                        self._hosts[key][host.hostname.lower()].append(host.ip)
                return _addresses(self._hosts[key].get(hostname, ())) or None
            case (protocol,):
                return _NO_VALUES if any(_servers(names, protocol, target)) else None
            case (port, protocol):
                found = [server for label, server in _servers(names, protocol, target) if label == port]
                return {SRV: found} if found else None
        return None


def _servers(names: ServiceNames, protocol: str, target: str) -> Iterator[tuple[str, Srv]]:
    """Yield the label of each port of *protocol*, and what its SRV records hold."""
    groups = names.groups or (HostGroup(names.ports, (DnsHost("", ""),)),)
    for group in groups:
        hostnames = dict.fromkeys(host.hostname for host in group.hosts)
        servers = [f"{hostname}.{target}" if hostname else target for hostname in hostnames]
        for port in group.ports:
            if f"_{port.protocol}".lower() == protocol:
                yield from ((f"_{port.name}".lower(), (_PRIORITY, _WEIGHT, port.number, each)) for each in servers)


def reverse_name(ip: str) -> Labels:
    return tuple(ipaddress.ip_address(ip).reverse_pointer.split("."))


def _addresses(ips: Iterable[str]) -> Values:
    found: dict[int, list[str]] = {}
    for ip in dict.fromkeys(ips):
        found.setdefault(A if family_of(ip) == 4 else AAAA, []).append(ip)
    return found


def _pod(dashed: str) -> Values | None:
    """Return the address that the name of a pod states, whether there is such a pod or not, as kube-dns did."""
    if "%" in dashed:  # an address with a zone, which no record can hold
        return None
    for separator in (".", ":"):
        try:
            return _addresses([str(ipaddress.ip_address(dashed.replace("-", separator)))])
        except ValueError:
            continue
    return None
