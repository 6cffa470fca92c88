"""The contract's world, built once; one proxy serves all Services of the table and those that tests bring."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.net.contract.cluster import CLUSTER_CIDRS, NODE, SERVICE_CIDRS, Backends, Cluster, build_cluster
from tests.net.contract.given import Given, node_object
from tests.net.contract.probes import differences
from tests.net.contract.table import CASES
from tests.net.world import Proxy, wait_until
from userspace_proxy.lab import Lab

KNOWS_PODS = ("--detect-local-mode", "ClusterCIDR", "--cluster-cidr", CLUSTER_CIDRS)


class Variant(NamedTuple):
    """A way to run the proxy. ``source_ip``: whom backends see where no annotation says it."""

    rules: str
    loop: str
    source_ip: str
    flags: tuple[str, ...] = KNOWS_PODS

    def __str__(self) -> str:
        return "-".join([self.rules, self.source_ip, *(flag.lstrip("-") for flag in self.flags[:2])])


VARIANTS = [
    Variant("nftables", "uvloop", "transparent"),
    Variant("iptables", "asyncio", "transparent"),
    Variant("nftables", "asyncio", "node"),
]


class ContractProxy(Proxy):
    """The proxy of node-1."""

    def __init__(self, cluster: Cluster, folder: Path, variant: Variant) -> None:
        super().__init__(cluster, folder, variant.rules, variant.loop)
        self.cluster = cluster
        self.variant = variant
        self.verbose = False
        self.apply(NODE, json.dumps(node_object()))

    def run_arguments(self) -> list[str]:
        return [
            *(*super().run_arguments(), "--hostname-override", NODE, "--service-cluster-ip-range", SERVICE_CIDRS),
            *("--source-ip", self.variant.source_ip, *self.variant.flags),
        ]

    def give(self, *given: Given) -> None:
        """Put Services in place, or other versions of them."""
        for each in given:
            self.apply(each.name, each.manifest())

    def expect(self, given: Given, *lines: str, timeout_s: float = 3.0) -> None:
        """Wait until *given* is served as *lines* say."""
        left: list[str] = []

        def is_so() -> bool:
            # Short: a SYN that came too early stays without an answer, however often it is sent again.
            left[:] = differences(self.cluster, given, *lines, patience_s=0.4)
            return not left

        try:
            wait_until(is_so, "it is so", timeout_s)
        except AssertionError:
            pytest.fail(f"after {timeout_s} s still {'; '.join(left)}")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with Lab() as lab:
        built = build_cluster(lab)
        backends = Backends(built)
        backends.start()
        yield built
        backends.close()


@pytest.fixture(scope="session", params=VARIANTS, ids=lambda variant: f"{variant.rules}-{variant.source_ip}")
def proxy(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[ContractProxy]:
    running = ContractProxy(cluster, tmp_path_factory.mktemp("contract"), request.param)
    running.give(*(given for given, _ in CASES))
    running.start()
    yield running
    assert running.stop() == 0, running.log()


@pytest.fixture(scope="session")
def numbers() -> Iterator[int]:
    """What the table leaves."""
    return itertools.count(len(CASES) + 1)


@pytest.fixture
def given(numbers: Iterator[int], request: pytest.FixtureRequest) -> Callable[..., Given]:
    """Makes a Service of a test's own."""

    def make(*slices: str, **fields: Any) -> Given:
        number = next(numbers)
        assert number < 250, "there are no addresses left"
        return Given(f"own-{number}", slices, number=number, **fields)

    return make
