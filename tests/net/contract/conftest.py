"""The contract's world, built once; one proxy serves all Services of the table and those that tests bring."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.apiserver import NODES, SERVICES, SLICES, ApiServerThread
from tests.net.contract.cluster import CLUSTER_CIDRS, NODE, SERVICE_CIDRS, Backends, Cluster, build_cluster
from tests.net.contract.modes import differences
from tests.net.contract.services import Given, node_object
from tests.net.contract.table import CASES
from tests.net.world import Proxy, wait_until
from tests.sources.test_kubernetes import kubeconfig
from userspace_proxy.lab import Lab, ServiceLab

KNOWS_PODS = ("--detect-local-mode", "ClusterCIDR", "--cluster-cidr", CLUSTER_CIDRS)


class Variant(NamedTuple):
    """A way to run the proxy.

    ``source_ip``: the client that backends see without an annotation. ``has_table``: it serves all cases.
    """

    rules: str
    loop: str
    source_ip: str
    flags: tuple[str, ...] = KNOWS_PODS
    follows_api: bool = False
    mode: str = "userspace"
    has_table: bool = True

    @property
    def said(self) -> str:
        if self.mode != "userspace":
            return f"mode-{self.mode}"
        return f"{self.rules}-{self.source_ip}{'-api' * self.follows_api}"

    def __str__(self) -> str:
        return "-".join([self.rules, self.source_ip, *(flag.lstrip("-") for flag in self.flags[:2])])


VARIANTS = [
    Variant("nftables", "uvloop", "transparent"),
    Variant("iptables", "asyncio", "transparent", follows_api=True),
    Variant("nftables", "asyncio", "node"),
    Variant("iptables", "uvloop", "transparent", mode="iptables"),
    Variant(
        "nftables", "uvloop", "transparent", (*KNOWS_PODS, "--nodeport-addresses", "0.0.0.0/0,::/0"), mode="nftables"
    ),
    Variant("nftables", "uvloop", "transparent", mode="ipvs"),
]


class ContractProxy(Proxy):
    """The proxy of node-1."""

    def __init__(self, cluster: Cluster, folder: Path, variant: Variant) -> None:
        lab = ServiceLab(cluster.lab, cluster.places["outside"].host, cluster.node, pods=())
        super().__init__(lab, folder, variant.rules, variant.loop)
        self.cluster = cluster
        self.variant = variant
        self.verbose = False
        self.apply(NODE, json.dumps(node_object()))

    def run_arguments(self) -> list[str]:
        return [
            *(*super().run_arguments(), "--hostname-override", NODE, "--service-cluster-ip-range", SERVICE_CIDRS),
            *("--source-ip", self.variant.source_ip, "--proxy-mode", self.variant.mode, *self.variant.flags),
        ]

    def close(self) -> None:
        assert self.stop() == 0, self.log()

    def give(self, *given: Given) -> None:
        """Put Services in place, or other versions of them."""
        for each in given:
            self.apply(each.name, each.manifest())

    def expect(self, given: Given, *lines: str, timeout_s: float = 20.0) -> None:
        """Wait until *given* is served as *lines* expect."""
        left: list[str] = []

        def is_so() -> bool:
            # Short: a SYN that came too early stays without an answer, however often it is sent again.
            left[:] = differences(self.cluster, given, *lines, mode=self.variant.mode, patience_s=0.4)
            return not left

        try:
            wait_until(is_so, "it is so", timeout_s)
        except AssertionError:
            pytest.fail(f"after {timeout_s} s still {'; '.join(left)}")


class ApiContractProxy(ContractProxy):
    """The same proxy, fed by an API server on its node."""

    _PATHS = {"Service": SERVICES, "EndpointSlice": SLICES, "Node": NODES}

    def __init__(self, cluster: Cluster, folder: Path, variant: Variant) -> None:
        with cluster.node.inside():
            sock = socket.create_server(("127.0.0.1", 0))
        self.api = ApiServerThread(sock)
        self.config = kubeconfig(folder, self.api.server.url)
        self._held: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
        super().__init__(cluster, folder, variant)

    def run_arguments(self) -> list[str]:
        arguments = super().run_arguments()
        at = arguments.index(str(self.manifests))
        return [*arguments[:at], "--kubeconfig", str(self.config), *arguments[at + 1 :]]

    def apply(self, name: str, manifest: str) -> None:
        """Write the objects of *manifest*; those that *name* had before and has no more are deleted."""
        objects = [json.loads(document) for document in manifest.split("---\n")]
        held = {(self._PATHS[given["kind"]], given["metadata"]["name"]): given for given in objects}
        before = self._held.get(name, {})
        self._held[name] = held
        for (path, _), given in held.items():
            self.api.do(self.api.server.put(path, given))
        for path, gone in before.keys() - held.keys():
            self.api.do(self.api.server.delete(path, gone))

    def delete(self, name: str) -> None:
        for path, gone in self._held.pop(name, {}):
            self.api.do(self.api.server.delete(path, gone))

    def close(self) -> None:
        super().close()
        self.api.close()


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with Lab() as lab:
        built = build_cluster(lab)
        backends = Backends(built)
        backends.start()
        yield built
        backends.close()


@contextlib.contextmanager
def contract_proxy(cluster: Cluster, folder: Path, variant: Variant) -> Iterator[ContractProxy]:
    """Yield the proxy of *variant*, which the block starts."""
    made = ApiContractProxy if variant.follows_api else ContractProxy
    proxy = made(cluster, folder, variant)
    try:
        yield proxy
        proxy.close()
    finally:
        proxy.end()


_PARAMS = [pytest.param(v, id=v.said, marks=[pytest.mark.ipvs] * (v.mode == "ipvs")) for v in VARIANTS]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run only the table in modes nftables and iptables, which have tests of their own; `make soak` runs all."""
    for item in items:
        in_mode = re.search(r"\[.*mode-(nftables|iptables)", item.nodeid)
        if in_mode and item.nodeid.startswith("tests/net/contract/") and "test_table.py" not in item.nodeid:
            item.add_marker(pytest.mark.soak)


@pytest.fixture(scope="session", params=_PARAMS)
def proxy(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[ContractProxy]:
    """A proxy that serves the Services of all cases, unless it has no table, and those that a test brings."""
    with contract_proxy(cluster, tmp_path_factory.mktemp("contract"), request.param) as running:
        if request.param.has_table:
            running.give(*(given for given, _ in CASES))
        running.start()
        yield running


@pytest.fixture(scope="session")
def numbers() -> Iterator[int]:
    """The numbers of Services after those of the table."""
    return itertools.count(len(CASES) + 1)


@pytest.fixture
def given(numbers: Iterator[int], request: pytest.FixtureRequest) -> Callable[..., Given]:
    """Makes a Service of a test's own."""

    def make(*slices: str, **fields: Any) -> Given:
        number = next(numbers)
        assert number < 250, "there are no addresses left"
        return Given(f"own-{number}", slices, number=number, **fields)

    return make
