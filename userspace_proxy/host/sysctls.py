"""Kernel settings of a proxy's node: size and time-outs of conntrack, and the length of accept queues.

As in kube-proxy, with one difference: a kernel that rejects a setting (a read-only /proc/sys, a container's namespace)
does not stop the proxy. The caller gets the rejected settings and reports them.
"""

import logging
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc/sys")
_NETFILTER = _PROC / "net/netfilter"
_HASH_SIZE = Path("/sys/module/nf_conntrack/parameters/hashsize")
# An upper bound for any number of cores (kubernetes/kubernetes#137002): an entry takes 300 bytes.
_SCALED_MAX = 1_048_576
_ENTRIES_A_BUCKET = 4

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ConntrackLimits:
    """Conntrack settings; 0 leaves the kernel's value unchanged."""

    max_per_core: int = 0
    min_entries: int = 0
    tcp_established_s: float = 0.0
    tcp_close_wait_s: float = 0.0
    tcp_be_liberal: bool = False
    udp_s: float = 0.0
    udp_stream_s: float = 0.0


KUBE_PROXY = ConntrackLimits(
    max_per_core=32_768, min_entries=131_072, tcp_established_s=86_400.0, tcp_close_wait_s=3_600.0
)


class Sysctl(NamedTuple):
    """One kernel setting; with ``at_least`` a larger value also satisfies it."""

    path: Path
    value: int
    at_least: bool = False

    def __str__(self) -> str:
        return ".".join(self.path.relative_to(_PROC).parts) if self.path.is_relative_to(_PROC) else str(self.path)

    def is_met_by(self, held: int) -> bool:
        return held == self.value or (self.at_least and held > self.value)


def conntrack_sysctls(limits: ConntrackLimits, cores: int) -> list[Sysctl]:
    """Return the settings that *limits* require on a node with *cores* cores.

    A larger table that an operator has configured is never reduced (kubernetes/kubernetes#142035).
    """
    wanted = []
    if limits.max_per_core:
        entries = max(min(limits.max_per_core * cores, _SCALED_MAX), limits.min_entries)
        wanted.append(Sysctl(_NETFILTER / "nf_conntrack_max", entries, at_least=True))
        wanted.append(Sysctl(_HASH_SIZE, entries // _ENTRIES_A_BUCKET, at_least=True))
    for name, seconds in (
        ("nf_conntrack_tcp_timeout_established", limits.tcp_established_s),
        ("nf_conntrack_tcp_timeout_close_wait", limits.tcp_close_wait_s),
        ("nf_conntrack_udp_timeout", limits.udp_s),
        ("nf_conntrack_udp_timeout_stream", limits.udp_stream_s),
    ):
        if seconds > 0:
            wanted.append(Sysctl(_NETFILTER / name, math.ceil(seconds)))
    if limits.tcp_be_liberal:
        wanted.append(Sysctl(_NETFILTER / "nf_conntrack_tcp_be_liberal", 1))
    return wanted


def knows_conntrack() -> bool:
    """Return whether the conntrack module is loaded; NAT rules load it."""
    return (_NETFILTER / "nf_conntrack_max").exists()


def queue_sysctl(backlog: int) -> Sysctl:
    """Return the setting that permits an accept queue of *backlog*; the kernel silently truncates longer ones."""
    return Sysctl(_PROC / "net/core/somaxconn", backlog, at_least=True)


def can_apply(wanted: Sysctl) -> bool:
    """Return whether *wanted* holds already or could be set; changes nothing."""
    return wanted.is_met_by(int(wanted.path.read_text())) or os.access(wanted.path, os.W_OK)


def apply(wanted: Iterable[Sysctl]) -> list[str]:
    """Apply the settings in *wanted* that do not hold yet; return a message for each one the kernel rejected."""
    refused = []
    for sysctl in wanted:
        held: int | str = "unknown"
        try:
            held = int(sysctl.path.read_text())
            if sysctl.is_met_by(held):
                continue
            sysctl.path.write_text(str(sysctl.value))
            log.info("%s: %d, was %d", sysctl, sysctl.value, held)
        except (OSError, ValueError) as error:
            why = (getattr(error, "strerror", None) or str(error)).lower()
            refused.append(f"{sysctl} is {held} and cannot be made {sysctl.value}: {why}")
    return refused
