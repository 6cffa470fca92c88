"""One control plane for all tests of this folder; the lab's hosts are those of tests/net."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.control_plane import ControlPlane, control_plane
from tests.net.conftest import world
from userspace_proxy.lab import ServiceLab

__all__ = ["world"]


@pytest.fixture(scope="session")
def plane(world: ServiceLab, certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    if "KUBE_BIN" not in os.environ:
        pytest.fail("KUBE_BIN names no folder with etcd, kube-apiserver and kube-controller-manager")
    with control_plane(world.node, tmp_path_factory.mktemp("plane"), certificates) as made:
        yield made
