"""The health-check node port, as a load balancer asks for it (behaviours H1 to H3)."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests.net.contract.cluster import PRIMARY
from tests.net.contract.conftest import ContractProxy
from tests.net.contract.probes import failure
from tests.net.contract.services import Given
from tests.net.contract.table import EXTERNAL_LOCAL, LB
from tests.net.world import wait_until
from userspace_proxy.lab import connect

MakeGiven = Callable[..., Given]


def check(proxy: ContractProxy, port: int, family: int = 4, path: str = "/") -> tuple[str, dict[str, str], str]:
    """Return the answer to a load balancer: status, headers and body."""
    try:
        with connect(proxy.cluster.places["outside"].host, PRIMARY[family], port, 1.0) as sock:
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n".encode())
            received = b""
            while part := sock.recv(4096):
                received += part
    except OSError as error:
        return failure(error), {}, ""
    if not received:
        return "closed", {}, ""  # it was about to close the port
    head, _, body = received.decode().partition("\r\n\r\n")
    status, *lines = head.split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return status.split()[1], headers, body


def becomes(proxy: ContractProxy, port: int, status: str, count: int = 0) -> None:
    def is_so() -> bool:
        said, headers, _ = check(proxy, port)
        weight = headers.get("x-load-balancing-endpoint-weight")
        return said == status and (weight == str(count) or status == "refused")

    wait_until(is_so, f"{status} with {count}")


def with_check(port: int, **more: Any) -> dict[str, Any]:
    return EXTERNAL_LOCAL | {"healthCheckNodePort": port} | more


def test_a_health_check_reports_the_number_of_local_endpoints(proxy: ContractProxy, given: MakeGiven) -> None:
    service = given("local1 local2 local3:unready remote1", type=LB, spec=with_check(32_001))
    proxy.give(service)
    becomes(proxy, 32_001, "200", 2)

    _, headers, body = check(proxy, 32_001, path="/any/path")
    said = {
        "service": {"namespace": "default", "name": service.name},
        "localEndpoints": 2,
        "serviceProxyHealthy": True,
    }
    assert body == json.dumps(said, indent="\t")
    assert headers["content-type"] == "application/json"
    assert headers["x-content-type-options"] == "nosniff"

    for slices, status, count in (
        ("local1:leaving local2 remote1", "200", 1),
        ("local1:leaving local2:leaving remote1", "503", 0),
        ("remote1", "503", 0),
        ("", "503", 0),
        ("local1 local2 local3 local4", "200", 4),
    ):
        proxy.give(service.but(slices=(slices,)))
        becomes(proxy, 32_001, status, count)


def test_the_health_check_port_follows_the_service(proxy: ContractProxy, given: MakeGiven) -> None:
    service = given("local1", type=LB, spec=with_check(32_002))
    proxy.give(service)
    becomes(proxy, 32_002, "200", 1)

    proxy.give(service.but(spec=with_check(32_003)))
    becomes(proxy, 32_003, "200", 1)
    becomes(proxy, 32_002, "refused")

    proxy.give(service.but(spec=with_check(32_003, externalTrafficPolicy="Cluster")))
    becomes(proxy, 32_003, "refused")

    proxy.give(service.but(spec=with_check(32_003)))
    becomes(proxy, 32_003, "200", 1)
    proxy.give(service.but(type="NodePort", spec=with_check(32_003)))
    becomes(proxy, 32_003, "refused")

    proxy.give(service.but(spec=with_check(32_003)))
    becomes(proxy, 32_003, "200", 1)
    proxy.delete(service.name)
    becomes(proxy, 32_003, "refused")


def test_two_services_have_two_ports(proxy: ContractProxy, given: MakeGiven) -> None:
    one, two = given("local1", type=LB, spec=with_check(32_004)), given("remote1", type=LB, spec=with_check(32_005))
    proxy.give(one, two)

    becomes(proxy, 32_004, "200", 1)
    becomes(proxy, 32_005, "503", 0)
