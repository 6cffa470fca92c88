"""The real kube-proxy answers every probe of the contract's table as our mode of the same name is expected to.

It is the check of the expectations, where those of `tests/net/contract/test_table.py` check us. Of an older kube-proxy
only that is asked which it knew already. `make test-cluster` runs it; nothing of a control plane is needed, so that for
`pytest -m cluster tests/cluster/test_kube_proxy_probes.py` the folder KUBE_BIN may hold a kube-proxy alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.kube_proxy import KubeProxy, Version, kube_proxy_binary, version_of
from tests.net.contract.cluster import NODE, Cluster
from tests.net.contract.conftest import cluster
from tests.net.contract.modes import expected, is_asked
from tests.net.contract.probes import REFUSED, TIMEOUT, Probe, ask_once, observe_all
from tests.net.contract.services import Given
from tests.net.contract.table import CASES, every_probe

__all__ = ["cluster"]
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

_ALL_ADDRESSES = ("--nodeport-addresses", "0.0.0.0/0,::/0")  # of itself nftables mode takes the primary ones (P1)
# What IPv6's TCP makes of an ICMP error: it believes it at its second SYN, after a second.
_LATE_REFUSAL_S = 4.0

_LEAVING = ("c2-leaving", "c2a-", "c3-", "c8-terminating", "c6-leaving", "t-some-leave", "t-all-leave")
_NODE_HINTS = ("c6-own-node", "c6-some-without-node", "c6-none-for-node", "c6-none-for-this")


def _is_named(*starts: str) -> Callable[[str, Probe], bool]:
    return lambda mode, probe: probe.given.name.startswith(starts)


def _is_short_circuit(mode: str, probe: Probe) -> bool:
    """From the node itself, by an external address, past the policy Local to endpoints elsewhere."""
    starts = ("c8-terminating", "n2-external-local")
    return mode == "nftables" and probe.client == NODE and _is_named(*starts)(mode, probe)


# Since when kube-proxy does what a probe is about; what is not named here it always did. Of all versions 1.20 alone
# was run so far: the numbers are those of release notes and sources, and the first newer one may show one to be wrong.
_SINCE: tuple[tuple[Version, Callable[[str, Probe], bool]], ...] = (
    ((1, 21), lambda _, probe: probe.client == NODE and probe.target.startswith("externalIP")),
    ((1, 22), _is_named("p7-zeros-in-front")),
    ((1, 22), lambda _, probe: probe.given.spec.get("internalTrafficPolicy") == "Local"),
    ((1, 24), _is_named("c6-")),
    ((1, 26), _is_named("p5-external-ip-local", *_LEAVING)),
    ((1, 26), lambda _, probe: probe.target == "nodePort@localhost" and probe.family == 6),
    ((1, 30), _is_named("p3-ip-mode-proxy")),
    ((1, 34), _is_named(*_NODE_HINTS)),
    ((1, 34), _is_short_circuit),
)


def is_known(version: Version, mode: str, probe: Probe) -> bool:
    return all(version >= since for since, concerns in _SINCE if concerns(mode, probe))


def is_readable(version: Version, given: Given) -> bool:
    """Return whether that Service is one to it: a Go of today reads no address with zeros in front, nor did it then."""
    return version >= (1, 22) or not given.name.startswith("p7-")


@pytest.fixture(params=["iptables", "nftables"])
def kube_proxy(cluster: Cluster, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[KubeProxy]:
    version = version_of(kube_proxy_binary())
    if request.param == "nftables" and version < (1, 31):
        pytest.skip("this kube-proxy has no nftables mode")
    flags = _ALL_ADDRESSES if request.param == "nftables" else ()
    made = KubeProxy(cluster, tmp_path, request.param, *flags)
    try:
        made.give(*(given for given, _ in CASES if is_readable(version, given)))
        made.start()
        yield made
    finally:
        made.close()


def test_kube_proxy_answers_as_our_mode_of_that_name_should(cluster: Cluster, kube_proxy: KubeProxy) -> None:
    mode = kube_proxy.mode
    asked = [probe for probe in every_probe() if is_asked(mode, probe) and is_known(kube_proxy.version, mode, probe)]

    seen = observe_all(cluster, asked)
    seen |= observe_all(cluster, [probe for probe in asked if seen[probe] != expected(mode, probe)])
    for probe in asked:
        if (expected(mode, probe), seen[probe], probe.family) == (REFUSED, TIMEOUT, 6):
            seen[probe], _ = ask_once(
                cluster.places[probe.client].host, *probe.address(), probe.protocol, _LATE_REFUSAL_S
            )

    assert len(asked) > 700
    assert {str(p): seen[p] for p in asked if seen[p] != expected(mode, p)} == {
        str(p): expected(mode, p) for p in asked if seen[p] != expected(mode, p)
    }
