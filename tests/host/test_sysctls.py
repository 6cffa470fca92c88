"""Kernel settings of a node: kube-proxy's rules for them, and that a refusal is no failure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from userspace_proxy.host import sysctls
from userspace_proxy.host.sysctls import (
    KUBE_PROXY,
    ConntrackLimits,
    Sysctl,
    apply,
    can_apply,
    conntrack_sysctls,
    queue_sysctl,
)
from userspace_proxy.lab import Host

NETFILTER = Path("/proc/sys/net/netfilter")


@pytest.fixture(autouse=True)
def in_a_namespace_of_its_own(host: Host) -> Iterator[None]:
    with host.inside():
        yield


def wanted(limits: ConntrackLimits, cores: int = 2) -> dict[str, int]:
    return {sysctl.path.name: sysctl.value for sysctl in conntrack_sysctls(limits, cores)}


def held(name: str) -> int:
    return int((NETFILTER / name).read_text())


@pytest.mark.parametrize(
    ("limits", "cores", "entries"),
    [
        (KUBE_PROXY, 2, 131_072),
        (KUBE_PROXY, 8, 262_144),
        (KUBE_PROXY, 256, 1_048_576),
        (ConntrackLimits(max_per_core=1, min_entries=2_000_000), 4, 2_000_000),
        (ConntrackLimits(max_per_core=0, min_entries=2_000_000), 4, None),
    ],
)
def test_room_in_conntrack_grows_with_cores_up_to_a_million(
    limits: ConntrackLimits, cores: int, entries: int | None
) -> None:
    told = wanted(limits, cores)

    assert told.get("nf_conntrack_max") == entries
    assert told.get("hashsize") == (entries and entries // 4)


def test_nothing_is_set_where_nothing_is_asked_for() -> None:
    assert wanted(ConntrackLimits()) == {}


def test_time_outs_are_kube_proxys() -> None:
    assert wanted(KUBE_PROXY) == {
        "nf_conntrack_max": 131_072,
        "hashsize": 32_768,
        "nf_conntrack_tcp_timeout_established": 86_400,
        "nf_conntrack_tcp_timeout_close_wait": 3_600,
    }


def test_the_kernel_takes_every_time_out() -> None:
    limits = ConntrackLimits(
        tcp_established_s=7_200, tcp_close_wait_s=1_800, tcp_be_liberal=True, udp_s=20.5, udp_stream_s=90
    )

    assert apply(conntrack_sysctls(limits, 2)) == []

    assert held("nf_conntrack_tcp_timeout_established") == 7_200
    assert held("nf_conntrack_tcp_timeout_close_wait") == 1_800
    assert held("nf_conntrack_tcp_be_liberal") == 1
    assert held("nf_conntrack_udp_timeout") == 21, "a fraction of a second more, never less"
    assert held("nf_conntrack_udp_timeout_stream") == 90


def test_a_time_out_is_lowered_too() -> None:
    assert apply([Sysctl(NETFILTER / "nf_conntrack_udp_timeout", 100)]) == []
    assert apply([Sysctl(NETFILTER / "nf_conntrack_udp_timeout", 10)]) == []

    assert held("nf_conntrack_udp_timeout") == 10


def test_room_that_is_there_is_never_taken_away(tmp_path: Path) -> None:
    file = tmp_path / "nf_conntrack_max"
    file.write_text("4000000\n")

    assert apply([Sysctl(file, 131_072, at_least=True)]) == []

    assert file.read_text() == "4000000\n"


def test_room_is_made_where_there_is_less(tmp_path: Path) -> None:
    file = tmp_path / "nf_conntrack_max"
    file.write_text("65536\n")

    assert apply([Sysctl(file, 131_072, at_least=True)]) == []

    assert file.read_text() == "131072"


def test_a_refused_sysctl_is_reported_with_its_present_value() -> None:
    # In a namespace that is not the host's the kernel lets nobody write it.
    present = held("nf_conntrack_max")

    refused = apply([Sysctl(NETFILTER / "nf_conntrack_max", present + 1)])

    (said,) = refused
    assert said.startswith(f"net.netfilter.nf_conntrack_max is {present} and cannot be made {present + 1}: ")
    assert held("nf_conntrack_max") == present


def test_can_apply_returns_a_refusal_without_changing_anything() -> None:
    present = held("nf_conntrack_max")

    assert can_apply(Sysctl(NETFILTER / "nf_conntrack_max", present))
    assert not can_apply(Sysctl(NETFILTER / "nf_conntrack_max", present + 1))
    assert can_apply(Sysctl(NETFILTER / "nf_conntrack_udp_timeout", 7))
    assert held("nf_conntrack_udp_timeout") != 7


def test_a_missing_sysctl_is_reported(tmp_path: Path) -> None:
    (said,) = apply([Sysctl(tmp_path / "none", 1)])

    assert said == f"{tmp_path / 'none'} is unknown and cannot be made 1: no such file or directory"


def test_a_queue_that_the_kernel_would_cut_is_made_longer() -> None:
    path = queue_sysctl(1).path
    path.write_text("128")

    assert apply([queue_sysctl(4_096)]) == []

    assert int(path.read_text()) == 4_096
    assert apply([queue_sysctl(512)]) == []
    assert int(path.read_text()) == 4_096


def test_conntrack_is_there() -> None:
    assert sysctls.knows_conntrack()
