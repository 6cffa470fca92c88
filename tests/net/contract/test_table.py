"""Every row of the table, on one proxy that serves all of its Services at once."""

from __future__ import annotations

import pytest

from tests.net.contract.cluster import Cluster
from tests.net.contract.conftest import ContractProxy
from tests.net.contract.modes import expected as expected_in
from tests.net.contract.modes import is_asked
from tests.net.contract.probes import Probe, observe_all
from tests.net.contract.table import every_probe

PROBES = list(every_probe())
SERVICES = list(dict.fromkeys(probe.given.name for probe in PROBES))


@pytest.fixture(scope="session")
def observed(cluster: Cluster, proxy: ContractProxy) -> dict[Probe, str]:
    """The results of all probes, which run side by side; a wrong one is repeated once. More than a thousand at once may
    lose some to a kernel's limits, so Kubernetes' own tests repeat theirs, too (behaviours N1a). A fault shows twice.
    """
    seen = observe_all(cluster, PROBES)
    doubtful = [p for p in PROBES if is_asked(proxy.variant.mode, p) and seen[p] != expected(proxy, p)]
    return {**seen, **observe_all(cluster, doubtful)}


@pytest.mark.parametrize("service", SERVICES)
def test_clients_see(service: str, observed: dict[Probe, str], proxy: ContractProxy) -> None:
    asked = [probe for probe in PROBES if probe.given.name == service and is_asked(proxy.variant.mode, probe)]

    assert {str(probe): observed[probe] for probe in asked} == {str(probe): expected(proxy, probe) for probe in asked}


def expected(proxy: ContractProxy, probe: Probe) -> str:
    said = expected_in(proxy.variant.mode, probe)
    is_replaced = proxy.variant.source_ip == "node" and not probe.given.annotations
    return said.replace(" as own", " as node") if is_replaced else said
