"""Cluster IPs, node ports and load balancer IPs of Services: stated and allocated ones. Pure.

With manifests as the source, this proxy allocates, as the API server and a load balancer controller do in a cluster.
With a cluster as the source, nothing is allocated: what the API states counts.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from userspace_proxy import api
from userspace_proxy.control import decode
from userspace_proxy.control.claims import PortalClaims, ValueClaims, ValueKind, ValueRequest
from userspace_proxy.control.decode import Allocation
from userspace_proxy.control.hosts import Hosts, reserved_port_fault
from userspace_proxy.control.memory import SavedAllocations
from userspace_proxy.control.pools import AddressRange, Network, NodePort, NodePortRange, Value
from userspace_proxy.errors import ConfigError
from userspace_proxy.model.endpoint import Family, family_of
from userspace_proxy.model.names import L4Protocol, NamespacedName, ServicePortName
from userspace_proxy.model.service import Portal

_LOAD_BALANCER_IP = "spec.loadBalancerIP"


class Allocations:
    """Assigns addresses and ports to Services: the values they state, except portals that another Service gets.

    This class is for a cluster, where every value is stated. *cluster_ips*: the ranges of cluster IPs, if known. A
    cluster IP that conflicts with them or with a host is reported.
    """

    def __init__(self, cluster_ips: Sequence[Network] = (), hosts: Hosts | None = None) -> None:
        self._ranges = cluster_ips
        self._hosts = hosts or Hosts()
        self._portals = PortalClaims()

    def assign(self, name: NamespacedName, service: api.Service) -> tuple[Allocation, list[ConfigError]]:
        """Assign values to *name*; return them, and an error for each unavailable value that is optional.

        Raises:
            ConfigError: a required value is not available. *name* keeps the values that it had before.
        """
        given = decode.given_cluster_ips(service)
        allocation, lost = _without_lost(self._portals, name, service, Allocation(tuple(ip for _, ip in given)))
        faults = [(field, self._hosts.cluster_ip_fault(ip, self._ranges)) for field, ip in given]
        fix = "it is served; change --service-cluster-ip-range, or the addresses of this node"
        return allocation, [*(ConfigError(why, field=field, fix=fix) for field, why in faults if why), *lost]

    def in_order(self, services: Mapping[NamespacedName, api.Service]) -> Iterable[NamespacedName]:
        """Move *services* to the values they now state, all at once, and return them in the order to `assign` them."""
        return services

    def held(self, name: NamespacedName) -> Allocation:
        """Return the values that *name* holds."""
        raise AssertionError("assign never raises here, so there is no earlier value to fall back to")

    def release(self, name: NamespacedName) -> None:
        """Release all values of *name*."""
        self._portals.release(name)

    def take_evicted(self) -> set[NamespacedName]:
        """Return the Services that lost or gained a value since the last call. They must be assigned again."""
        return self._portals.take_evicted()

    @property
    def changes(self) -> int:
        """The number of values taken and released; a new number means that `memory` must be saved again."""
        return 0

    def memory(self) -> SavedAllocations:
        """Return the allocated values, to be saved for the next process."""
        return SavedAllocations()


class ManifestAllocations(Allocations):
    """Allocates values that Services in manifests do not state. They stay the same after a restart.

    *reserved*: cluster IPs that are allocated to no Service.
    """

    def __init__(
        self,
        cluster_ips: Sequence[Network],
        memory: SavedAllocations | None = None,
        load_balancer_pool: Sequence[Network] = (),
        hosts: Hosts | None = None,
        reserved: Sequence[str] = (),
    ) -> None:
        super().__init__(cluster_ips, hosts)
        memory = memory or SavedAllocations()
        self._cluster_ranges = [AddressRange(network, memory.cluster_ips) for network in cluster_ips]
        for pool, ip in itertools.product(self._cluster_ranges, reserved):
            pool.take(ip, ip)
        self._load_balancer_ranges = [AddressRange(network, memory.load_balancer_ips) for network in load_balancer_pool]
        self._node_ports = {
            protocol: NodePortRange(protocol, _of_protocol(protocol, memory.node_ports)) for protocol in L4Protocol
        }
        self._remembered = {*memory.cluster_ips, *memory.load_balancer_ips, *memory.node_ports}
        self._claims = ValueClaims([*self._cluster_ranges, *self._load_balancer_ranges, *self._node_ports.values()])
        self._portals = PortalClaims(memory.external_portals)
        # What Services request that are in order, and not assigned yet.
        self._ordered: dict[NamespacedName, tuple[api.Service, list[ValueRequest]]] = {}

    @property
    def changes(self) -> int:
        return self._claims.changes + self._portals.changes

    def memory(self) -> SavedAllocations:
        return SavedAllocations(
            cluster_ips=_texts(self._claims.allocated(ValueKind.CLUSTER_IP)),
            load_balancer_ips=_texts(self._claims.allocated(ValueKind.LOAD_BALANCER_IP)),
            node_ports=_numbers(self._claims.allocated(ValueKind.NODE_PORT)),
            external_portals=self._portals.memory(),
        )

    def in_order(self, services: Mapping[NamespacedName, api.Service]) -> Iterable[NamespacedName]:
        self._ordered = {}
        for name, service in services.items():
            with contextlib.suppress(ConfigError):  # `assign` reports it
                self._ordered[name] = service, self._requests(name, service)
        requests = {name: requests for name, (_, requests) in self._ordered.items()}
        self._claims.apply_moves({name: own for name, own in requests.items() if self._claims.has_any(name)})
        return sorted(services, key=lambda name: self._rank(requests.get(name, ())))

    def _rank(self, requests: Sequence[ValueRequest]) -> int:
        """Return the rank of a Service with *requests*: remembered values come first, then stated, then the others.

        This way a Service keeps its allocated address after a restart, even if another Service states it now.
        """
        if any(request.stated is None and request.key in self._remembered for request in requests):
            return 0
        return 1 if any(request.stated is not None for request in requests) else 2

    def assign(self, name: NamespacedName, service: api.Service) -> tuple[Allocation, list[ConfigError]]:
        of, requests = self._ordered.pop(name, (None, ()))
        problems = self._claims.assign(name, requests if of is service else self._requests(name, service))
        allocation, lost = _without_lost(self._portals, name, service, self.held(name), self._hosts.portal_fault)
        return allocation, [*problems, *self._load_balancer_ip(service)[1], *lost]

    def held(self, name: NamespacedName) -> Allocation:
        ports = self._claims.held(name, ValueKind.NODE_PORT)
        health_check = _health_check_key(name)
        return Allocation(
            cluster_ips=tuple(_texts(self._claims.held(name, ValueKind.CLUSTER_IP)).values()),
            node_ports={_port_key(key): number for key, number in _numbers(ports).items() if key != health_check},
            load_balancer_ips=tuple(_texts(self._claims.held(name, ValueKind.LOAD_BALANCER_IP)).values()),
            health_check_node_port=_numbers(ports).get(health_check, 0),
            lost=self._portals.lost(name),
        )

    def release(self, name: NamespacedName) -> None:
        self._claims.release(name)
        super().release(name)

    def take_evicted(self) -> set[NamespacedName]:
        evicted, self._claims.evicted = self._claims.evicted, set()
        return evicted | super().take_evicted()

    # ---- the values that a Service requests

    def _requests(self, name: NamespacedName, service: api.Service) -> list[ValueRequest]:
        cluster_ips = list(self._cluster_ip_requests(name, service))
        families = [_family(request) for request in cluster_ips]
        return [
            *cluster_ips,
            *self._node_port_requests(name, service),
            *self._load_balancer_requests(name, service, families),
        ]

    def _cluster_ip_requests(self, name: NamespacedName, service: api.Service) -> Iterator[ValueRequest]:
        given = decode.given_cluster_ips(service)
        for field, ip in given:
            if why := self._hosts.cluster_ip_fault(ip, self._ranges):
                fix = "choose another one, leave it out, or change --service-cluster-ip-range"
                raise ConfigError(why, field=field, fix=fix)
            yield ValueRequest(ValueKind.CLUSTER_IP, f"{name}/IPv{family_of(ip)}", field, ip)
        if not given:
            pools = self._wanted_ranges(service)
        elif _ip_family_policy(service) == "SingleStack":
            pools = []
        else:
            stated = {family_of(ip) for _, ip in given}
            pools = [pool for pool in self._cluster_ranges if pool.family not in stated]
        for pool in pools:
            key, fix = f"{name}/IPv{pool.family}", "widen --service-cluster-ip-range"
            yield ValueRequest(ValueKind.CLUSTER_IP, key, "spec.clusterIP", pool=pool, fix=fix)

    def _wanted_ranges(self, service: api.Service) -> list[AddressRange]:
        assert service.spec is not None
        families = service.spec.ip_families or []
        policy = _ip_family_policy(service)
        by_family = {f"IPv{pool.family}": pool for pool in self._cluster_ranges}
        if families and not by_family.keys() & set(families):
            raise ConfigError(
                f"no cluster IP range is {families[0]}",
                field="spec.ipFamilies[0]",
                fix="add one to --service-cluster-ip-range, or choose another family",
            )
        wanted = [by_family[f] for f in families if f in by_family] or self._cluster_ranges[:1]
        if policy in ("PreferDualStack", "RequireDualStack"):
            wanted += [pool for pool in self._cluster_ranges if pool not in wanted]
        return wanted if policy != "SingleStack" else wanted[:1]

    def _node_port_requests(self, name: NamespacedName, service: api.Service) -> Iterator[ValueRequest]:
        spec = service.spec
        assert spec is not None
        if not decode.has_node_ports(spec):
            return
        held = self._claims.held(name, ValueKind.NODE_PORT).values()

        def fault(port: NodePort) -> str:
            return "" if port in held else self._hosts.node_port_fault(port)

        for index, port in enumerate(spec.ports or ()):
            protocol = port.protocol or "TCP"
            if protocol in L4Protocol.__members__ and (port.node_port or decode.wants_node_ports(spec)):
                key = _node_port_key(ServicePortName(name, port.name or "", L4Protocol(protocol)))
                yield self._node_port_request(key, f"spec.ports[{index}].nodePort", protocol, port.node_port, fault)
        if decode.wants_health_check(spec):
            # A listener of this node does not matter here: the predecessor has one until it has handed over.
            key, field, stated = _health_check_key(name), "spec.healthCheckNodePort", spec.health_check_node_port
            yield self._node_port_request(key, field, "TCP", stated, reserved_port_fault)

    def _node_port_request(
        self, key: str, field: str, protocol: str, stated: int | None, fault: Callable[[NodePort], str]
    ) -> ValueRequest:
        value = NodePort(protocol, stated) if stated else None
        if value is not None and (why := fault(value)):
            raise ConfigError(why, field=field, fix="choose another one, or leave it out")
        pool, fix = self._node_ports[L4Protocol(protocol)], "state one outside of that range, or free some"
        return ValueRequest(ValueKind.NODE_PORT, key, field, value, pool, fix=fix)

    def _load_balancer_requests(
        self, name: NamespacedName, service: api.Service, families: Sequence[Family]
    ) -> Iterator[ValueRequest]:
        stated, problems = self._load_balancer_ip(service)
        if problems or not decode.wants_load_balancer_ips(service):
            return
        for pool in self._load_balancer_ranges:
            if pool.family in families:
                key, fix = f"{name}/load-balancer/IPv{pool.family}", "widen --load-balancer-pool"
                ip = stated if stated is not None and stated in pool else None
                yield ValueRequest(ValueKind.LOAD_BALANCER_IP, key, _LOAD_BALANCER_IP, ip, pool, optional=True, fix=fix)

    def _load_balancer_ip(self, service: api.Service) -> tuple[str | None, list[ConfigError]]:
        """Return the pool address that *service* states, or None; and the error if it states one outside the pool."""
        given = ((service.spec.load_balancer_ip if service.spec else None) or "").strip()
        if not given or not self._load_balancer_ranges or not decode.wants_load_balancer_ips(service):
            return None, []
        try:
            ip = decode.canonical_ip(given, _LOAD_BALANCER_IP)
        except ConfigError as error:
            return None, [error]
        if any(ip in pool for pool in self._load_balancer_ranges):
            return ip, []
        reason, fix = f"{given} is not in --load-balancer-pool", "choose one that is, or leave it out"
        return None, [ConfigError(reason, field=_LOAD_BALANCER_IP, fix=fix)]


def _without_lost(
    claims: PortalClaims,
    name: NamespacedName,
    service: api.Service,
    allocation: Allocation,
    fault: Callable[[Portal], str] = lambda _: "",
) -> tuple[Allocation, list[ConfigError]]:
    """Return *allocation* with the portals marked as lost that other Services get or that have a *fault*.

    Also return a problem for each. A portal that the Service has stays its own.
    """
    stated = decode.stated_portals(service, allocation)
    had = claims.stated(name)
    why_not = {portal: why for portal in stated if portal not in had and (why := fault(portal))}
    created = service.metadata.creation_timestamp
    lost = claims.claim(name, decode.own_portals(service, allocation), stated, created, refused=why_not)
    why_not |= {portal: f"{portal} is served for {holder}, and not for this Service" for portal, holder in lost.items()}
    if not (why_not or allocation.lost):
        return allocation, []
    problems = [
        ConfigError(why, field=stated[portal], fix="choose another address or port")
        for portal, why in sorted(why_not.items(), key=lambda item: (stated[item[0]], str(item[0])))
    ]
    return replace(allocation, lost=frozenset(why_not)), problems


def _ip_family_policy(service: api.Service) -> str:
    assert service.spec is not None
    families = service.spec.ip_families or []
    return service.spec.ip_family_policy or ("RequireDualStack" if len(families) > 1 else "SingleStack")


def _family(request: ValueRequest) -> Family:
    return request.pool.family if isinstance(request.pool, AddressRange) else family_of(str(request.stated))


def _node_port_key(name: ServicePortName) -> str:
    return f"{name}/{name.protocol}"


def _health_check_key(name: NamespacedName) -> str:
    return f"{name}/health-check"


def _port_key(key: str) -> decode.PortKey:
    """Return the port name and protocol from a key of `_node_port_key`."""
    name, _, protocol = key.rpartition("/")
    return name.partition(":")[2], protocol


def _of_protocol(protocol: L4Protocol, remembered: Mapping[str, int]) -> dict[str, Value]:
    """Return the *remembered* numbers of *protocol*; health check ports are TCP."""
    return {
        key: NodePort(protocol, number)
        for key, number in remembered.items()
        if (L4Protocol.UDP if key.endswith("/UDP") else L4Protocol.TCP) is protocol
    }


def _texts(values: Mapping[str, Value]) -> dict[str, str]:
    return {key: value for key, value in values.items() if isinstance(value, str)}


def _numbers(values: Mapping[str, Value]) -> dict[str, int]:
    return {key: value.number for key, value in values.items() if isinstance(value, NodePort)}
