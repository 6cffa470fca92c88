"""A Source that follows Services, EndpointSlices, this node's Node and ServiceCIDRs, each with its own reflector.

Requests use kube-proxy's selectors, so they return only what a node proxy needs.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import msgspec

from userspace_proxy import api
from userspace_proxy.api.events import EventType, ObjectEvent
from userspace_proxy.model.names import NamespacedName
from userspace_proxy.model.watch_stats import WatchStats
from userspace_proxy.sources.merged import merged
from userspace_proxy.sources.reflector import Change, Pace, Reflector
from userspace_proxy.sources.transport import Transport

_PROXY_NAME_LABEL = "service.kubernetes.io/service-proxy-name"
_HEADLESS_LABEL = "service.kubernetes.io/headless"
# As long as kube-proxy waits for its Node before it starts without it (behaviours Z6).
_NODE_PATIENCE_S = 30.0
# ServiceCIDR exists since Kubernetes 1.33, and some accounts may not read it. Readiness does not depend on it.
_OPTIONAL = "ServiceCIDR"

Reflectors = Mapping[str, Reflector[Any]]
_Batch = tuple[str, list[Change[Any]]]


def reflectors(
    transport: Transport,
    node_name: str,
    service_proxy_name: str,
    pace: Pace,
    chance: random.Random,
    *,
    for_dns: bool = False,
) -> Reflectors:
    """Return a reflector for each kind.

    With *service_proxy_name*, it follows only Services that name this proxy; without it, Services that name none
    (behaviours S2). *for_dns*: all Services and slices, as also headless Services and those of other proxies have
    names.
    """
    selector = f"{_PROXY_NAME_LABEL}={service_proxy_name}" if service_proxy_name else f"!{_PROXY_NAME_LABEL}"

    def follows(
        plural: str,
        path: str,
        kind: type[api.KubernetesObject],
        filters: Mapping[str, str] | None = None,
        **params: str,
    ) -> Reflector[Any]:
        decoder = msgspec.json.Decoder(kind)
        is_optional = kind is api.ServiceCIDR
        return Reflector(
            plural, path, params, decoder, transport, pace=pace, chance=chance, filters=filters, is_optional=is_optional
        )

    return {
        "Service": follows(
            "services",
            "/api/v1/services",
            api.Service,
            labelSelector="" if for_dns else selector,
            filters=None if for_dns else {"fieldSelector": "spec.clusterIP!=None"},  # known since Kubernetes 1.31
        ),
        "EndpointSlice": follows(
            "endpointslices",
            "/apis/discovery.k8s.io/v1/endpointslices",
            api.EndpointSlice,
            labelSelector="" if for_dns else f"!{_HEADLESS_LABEL}",
        ),
        "Node": follows("nodes", "/api/v1/nodes", api.Node, fieldSelector=f"metadata.name={node_name}"),
        _OPTIONAL: follows("servicecidrs", "/apis/networking.k8s.io/v1/servicecidrs", api.ServiceCIDR),
    }


def service_reflectors(
    transport: Transport, name: NamespacedName | None, pace: Pace, chance: random.Random
) -> Reflectors:
    """Return reflectors for Services and EndpointSlices: those of *name*, in its namespace only, or all of them."""

    def follows(path: str, kind: type[api.KubernetesObject], **params: str) -> Reflector[Any]:
        group, _, plural = path.rpartition("/")
        if name is not None:
            path = f"{group}/namespaces/{name.namespace}/{plural}"
        decoder = msgspec.json.Decoder(kind)
        selectors = {key: f"{field}={name.name}" for key, field in params.items()} if name is not None else {}
        return Reflector(plural, path, selectors, decoder, transport, pace=pace, chance=chance)

    slices, label = "/apis/discovery.k8s.io/v1/endpointslices", "kubernetes.io/service-name"
    return {
        "Service": follows("/api/v1/services", api.Service, fieldSelector="metadata.name"),
        "EndpointSlice": follows(slices, api.EndpointSlice, labelSelector=label),
    }


class KubernetesSource:
    """Reports the objects of a cluster's API. A failure becomes a problem, and reported objects stay in force.

    *for_dns*: with Services that this proxy does not serve.
    """

    def __init__(
        self, following: Reflectors, node_patience_s: float = _NODE_PATIENCE_S, *, for_dns: bool = False
    ) -> None:
        self._reflectors = following
        self._for_dns = for_dns
        self._node_patience_s = node_patience_s

    @property
    def watches(self) -> Sequence[WatchStats]:
        return [reflector.stats for kind, reflector in self._reflectors.items() if kind != _OPTIONAL]

    @property
    def problems(self) -> Mapping[str, str]:
        found = {stats.kind: stats.failure() for stats in self.watches if stats.failing_since is not None}
        for reflector in self._reflectors.values():
            found.update({problem: problem for problem in reflector.problems.values()})
        return found

    async def events(self) -> AsyncGenerator[Sequence[ObjectEvent]]:
        following = {f"follow {kind}": self._changes(kind) for kind in self._reflectors}
        unlisted = set(self._reflectors) - {_OPTIONAL}
        async with merged({**following, "wait for the Node": self._patience()}) as next_batch:
            while batch := await next_batch(None):
                kind, changes = batch
                if changes:
                    yield [self._event(kind, change) for change in changes]
                    changes.clear()  # the generators that passed on the list keep it until they have the next one
                if kind in unlisted:
                    unlisted.remove(kind)
                    if not unlisted:
                        yield [ObjectEvent(EventType.SYNCED)]

    async def _changes(self, kind: str) -> AsyncGenerator[_Batch]:
        async with contextlib.aclosing(self._reflectors[kind].changes()) as changes:
            async for batch in changes:
                yield kind, batch

    async def _patience(self) -> AsyncGenerator[_Batch]:
        """Yield the Node as listed, though it is not, after a while."""
        await asyncio.sleep(self._node_patience_s)
        yield "Node", []

    def _event(self, kind: str, change: Change[Any]) -> ObjectEvent:
        given = change.object
        if isinstance(given, api.Service) and not self._is_wanted(given):
            given = None
        if given is None:
            return ObjectEvent(EventType.DELETE, kind, change.name)
        return ObjectEvent(EventType.SET, kind, change.name, given)

    def _is_wanted(self, service: api.Service) -> bool:
        """Return whether *service* is proxied, which always has an IP here (behaviours S1), or has a name."""
        if (spec := service.spec) is None:
            return False
        has_name = spec.cluster_ip == "None" or bool(spec.external_name)
        return (self._for_dns and has_name) or spec.cluster_ip not in (None, "", "None")
