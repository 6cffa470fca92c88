"""The one health of an endpoint, of what probes and dials say."""

from __future__ import annotations

from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.probe import HEALTHY, EndpointCondition, EndpointHealth, endpoint_health

A, B, C, D = (Endpoint(f"10.0.0.{number}", 80) for number in range(1, 5))
UNHEALTHY = EndpointHealth(EndpointCondition.UNHEALTHY, 1.0, "http /: status 503")
EJECTED = EndpointHealth(EndpointCondition.EJECTED, 2.0, "dials failed, 1 in a row")
RECOVERED = EndpointHealth(EndpointCondition.HEALTHY, 3.0, "http /: it answers again")


def test_what_probes_say_against_an_endpoint_comes_first_then_what_dials_say() -> None:
    probed = {A.address: UNHEALTHY, B.address: RECOVERED, C.address: RECOVERED}
    ejected = {A.address: EJECTED, B.address: EJECTED}

    assert endpoint_health((A, B, C, D), probed, ejected) == {
        A.address: UNHEALTHY,
        B.address: EJECTED,
        C.address: RECOVERED,
        D.address: HEALTHY,
    }
