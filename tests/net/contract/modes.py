"""Differences of each mode from the table, which describes userspace mode, with their reasons."""

from __future__ import annotations

from tests.net.contract.cluster import NODE, Cluster
from tests.net.contract.probes import FORBIDDEN, PATIENCE_S, REFUSED, TIMEOUT, Probe, observe_all, probes
from tests.net.contract.services import Given

# Whose address backends see is the kernel's to say, and it can put no header before a client's bytes.
_ANNOTATED = "userspace-proxy/source-ip"


def is_asked(mode: str, probe: Probe) -> bool:
    """Return whether *mode* has the feature that *probe* tests."""
    return mode == "userspace" or probe.given.annotations.get(_ANNOTATED, "transparent") == "transparent"


def expected(mode: str, probe: Probe) -> str:
    """Return the expected result of *probe* in *mode*."""
    return _as_told(mode, probe, _expected(mode, probe))


def differences(
    cluster: Cluster, given: Given, *lines: str, mode: str = "userspace", patience_s: float = PATIENCE_S
) -> list[str]:
    """Return the lines of *lines*, written for *mode*, that differ from the observed results."""
    wanted = {probe: _as_told(mode, probe, probe.expected) for probe in probes(given, *lines)}
    seen = observe_all(cluster, [p._replace(expected=said) for p, said in wanted.items()], patience_s)
    told = zip(wanted.items(), seen.values(), strict=True)
    return [f"{probe}: {found}, not {said}" for (probe, said), found in told if found != said]


def _as_told(mode: str, probe: Probe, said: str) -> str:
    """Return *said*, or FORBIDDEN if a rule at OUTPUT rejects a datagram of the node itself.

    Userspace mode redirects it to a closed port. Rules for the node's own addresses, which Services' are in ipvs mode,
    stand at INPUT.
    """
    is_at_output = mode in ("nftables", "iptables") and not probe.target.startswith("nodePort")
    return FORBIDDEN if (said, probe.client, probe.protocol) == (REFUSED, NODE, "UDP") and is_at_output else said


def _expected(mode: str, probe: Probe) -> str:
    if mode == "iptables":
        return _in_iptables_mode(probe)
    if mode in ("nftables", "ipvs") and (
        "nodePort@localhost" in probe.target or probe.given.name.startswith("n3-another-port")
    ):
        return REFUSED  # loopback has no node ports (P1), and the other ports of a cluster IP are refused (N3)
    return probe.expected


def _in_iptables_mode(probe: Probe) -> str:
    target = probe.target.partition(":")[0]
    if target == "nodePort@localhost" and probe.family == 6:
        # IPv6 has no route_localnet (behaviours P1); what is dropped for others is dropped here, too.
        return TIMEOUT if probe.given.name == "n2-external-local-without-local" else REFUSED
    if probe.expected == REFUSED and probe.client == NODE and target in ("vip", "externalIP"):
        # KUBE-EXTERNAL-SERVICES hangs at INPUT and FORWARD, and for UDP at OUTPUT, too (N1a).
        return REFUSED if probe.protocol == "UDP" else TIMEOUT
    if probe.given.name == "p4-without-endpoints" and probe.expected == TIMEOUT:
        return REFUSED  # without endpoints there is no KUBE-FW chain that would keep anybody out (P4)
    return probe.expected
