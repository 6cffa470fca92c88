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


@pytest.fixture(scope="session")
def observed(cluster: Cluster, proxy: ContractProxy) -> dict[Probe, str]:
    """What came of all probes, asked side by side."""
    return observe_all(cluster, PROBES)


@pytest.mark.parametrize("probe", PROBES, ids=str)
def test_a_client_sees(probe: Probe, observed: dict[Probe, str], proxy: ContractProxy) -> None:
    mode = proxy.variant.mode
    if not is_asked(mode, probe):
        pytest.skip(f"{mode} mode cannot do it")
    expected = expected_in(mode, probe)
    if proxy.variant.source_ip == "node" and not probe.given.annotations:
        expected = expected.replace(" as own", " as node")

    assert observed[probe] == expected
