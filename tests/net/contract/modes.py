"""What a mode answers otherwise than the table says, each with its reason: the table is of userspace mode."""

from __future__ import annotations

from tests.net.contract.cluster import NODE
from tests.net.contract.probes import REFUSED, TIMEOUT, Probe

# Whose address backends see is the kernel's to say, and it can put no header before a client's bytes.
_ANNOTATED = "userspace-proxy/source-ip"


def is_asked(mode: str, probe: Probe) -> bool:
    """Return whether *mode* can do at all what *probe* is about."""
    return mode == "userspace" or probe.given.annotations.get(_ANNOTATED, "transparent") == "transparent"


def expected(mode: str, probe: Probe) -> str:
    """Return what is to come of *probe* in *mode*."""
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
        return TIMEOUT  # KUBE-EXTERNAL-SERVICES hangs at INPUT and FORWARD, not at OUTPUT (N1a)
    if probe.given.name == "p4-without-endpoints" and probe.expected == TIMEOUT:
        return REFUSED  # without endpoints there is no KUBE-FW chain that would keep anybody out (P4)
    return probe.expected
