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
    if proxy.variant.mode == "nftables":
        if probe.given.annotations:
            pytest.skip("whose address backends see is the kernel's matter in this mode")
        expected = _as_by_nftables(str(probe), expected)

    assert observed[probe] == expected


def _as_by_nftables(probe: str, expected: str) -> str:
    """Return what kube-proxy's own nftables mode does where it differs: loopback has no node ports (P1), and the other
    ports of a cluster IP are refused (N3).
    """
    return "refused" if "nodePort@localhost" in probe or probe.startswith("n3-another-port") else expected
