"""Our proxy as the node proxy of the real control plane, and what its clients see."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.cluster.control_plane import NODE_NAME, SERVICES, SLICES, ControlPlane, Object
from tests.net.world import Proxy, answers, is_refused, wait_until
from userspace_proxy.lab import HTTP_PORT, Host, ServiceLab

HTTP: Sequence[Object] = ({"name": "http", "port": 80, "targetPort": HTTP_PORT},)


class NodeProxy(Proxy):
    """`userspace-proxy run --kubeconfig` on the lab's node."""

    def __init__(self, world: ServiceLab, folder: Path, plane: ControlPlane) -> None:
        super().__init__(world, folder)
        self.plane = plane
        self.config = plane.proxy_config

    def run_arguments(self) -> list[str]:
        return [
            *("run", "--kubeconfig", str(self.config), "--hostname-override", NODE_NAME, "--rules", self.rules),
            *("--state-dir", str(self.folder / "state"), "--verbose"),
        ]

    def health(self, path: str = "/healthz") -> tuple[int, Any]:
        status, body = self.get(path, 10256)
        return status, json.loads(body)

    # ---- what clients see

    def reaches(self, ip: str, *pods: str, port: int = 80) -> None:
        """Wait until exactly *pods* answer at *ip*; without pods, until connections are refused."""
        client = self.world.client
        if not pods:
            wait_until(lambda: refuses(client, ip, port), f"{ip}:{port} is refused")
            return

        def who() -> set[str]:
            return {answers(client, ip, port) for _ in range(3 * len(pods) + 2)}

        wait_until(lambda: who() == set(pods), f"{pods} answer at {ip}:{port}; now {who()}")

    def leaves(self, ip: str) -> None:
        """Wait until no rule names *ip*: its packets fall through."""
        wait_until(lambda: ip not in self.rules_text(), f"{ip} is left alone")


def refuses(client: Host, ip: str, port: int) -> bool:
    """Whether a connection is refused; before there is a rule, its packets find no route."""
    with contextlib.suppress(OSError):
        return is_refused(client, ip, port)
    return False


def make_service(plane: ControlPlane, name: str, ports: Sequence[Object] = HTTP, **spec: Any) -> str:
    """Create a Service; return its cluster IP."""
    labels = spec.pop("labels", None)
    made = plane.create(SERVICES, name, labels=labels, spec={"ports": list(ports), **spec})
    address: str = made["spec"].get("clusterIP", "")
    return address


def make_slice(
    plane: ControlPlane,
    name: str,
    service: str | None,
    *addresses: str,
    ports: Sequence[Object] = ({"name": "http", "port": HTTP_PORT, "protocol": "TCP"},),
    kind: str = "IPv4",
    labels: dict[str, str] | None = None,
) -> None:
    """Write an EndpointSlice by hand."""
    tie = {} if service is None else {"kubernetes.io/service-name": service}
    endpoints = [{"addresses": [address], "conditions": {"ready": True}} for address in addresses]
    plane.create(
        SLICES, name, labels={**tie, **(labels or {})}, addressType=kind, endpoints=endpoints, ports=list(ports)
    )
