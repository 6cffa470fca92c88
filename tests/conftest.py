"""Tests run in private namespaces, so that real rules and real hosts do no harm.

`pytest` started anywhere moves itself there first: as root, or as a plain user with user namespaces. With pytest-xdist
each worker process has network and mount namespaces of its own, so that tests in different workers share no host.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import uvloop
from xdist.scheduler import LoadScopeScheduling

from tests.fakes import FakeClock
from userspace_proxy import lab

# However busy the machine is: time is no reason to fail.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")

_INSIDE = "USERSPACE_PROXY_TESTS_IN_NAMESPACES"
_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # until the tests are collected: they stay, and searching them takes as long as collecting them
    if "PYTEST_XDIST_WORKER" in os.environ:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "entering namespaces of a worker's own")
        return
    if os.environ.get(_INSIDE):
        return
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.suspend_global_capture(in_=True)
    command = lab.command_in_namespaces([sys.executable, "-m", "pytest", *sys.argv[1:]])
    os.execvpe(command[0], command, {**os.environ, _INSIDE: "1"})  # noqa: S606 - a list, no shell


# The modules of the contract whose tests share one proxy for each of its variants.
_SHARE_CONTRACT_PROXIES = {
    f"tests/net/contract/test_{name}.py" for name in ("affinity", "changes", "health_check", "table", "udp")
}
_CONTRACT_PROXY = re.compile(r"mode-\w+|(nftables|iptables)-(node|transparent)(-api)?")


# In this order, the longest first, so that short ones are left for the end of the run. The longest prefix counts. Those
# of tests/net stay together, as a worker that comes from another package has to build their lab again.
_FIRST = (
    "tests/examples/test_lessons",
    "tests/net/test_lifecycle",
    "tests/net/contract/",
    "tests/net/test_failover",
    "tests/net/test_kernel_modes",
    "tests/net/test_trace",
    "tests/net/",
    "tests/net/test_handover",
    "tests/contract/test_plane",
    "tests/sources/test_reflector",
    "tests/simulation/",
    "tests/modes/userspace/",
    "tests/dataplane/",
    "tests/explain/test_render",
    "tests/lab/test_shell",
)
# Each test has a proxy or a lab of its own.
_SHARE_NOTHING = ("tests/examples/test_lessons.py", "tests/lab/test_shell.py", "tests/net/test_handover.py")


class HostScheduling(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """Give each module to one worker process, if its tests share hosts; tests of the contract go by variant."""

    def _split_scope(self, nodeid: str) -> str:
        module, _, test = nodeid.partition("::")
        if module == "tests/net/contract/test_world.py":
            return "nftables-node"  # a proxy in a kernel mode would have a say in what it asks
        if module in _SHARE_NOTHING:
            return nodeid
        if variant := _CONTRACT_PROXY.search(test) if module in _SHARE_CONTRACT_PROXIES else None:
            return variant[0]
        return module

    def _reschedule(self, node: Any) -> None:
        """Give *node* work once it has collected the tests: one that replaces a worker that ended has not yet.

        xdist asks too early if two workers end at about the same time, and fails with a KeyError.
        """
        if node in self.registered_collections:
            super()._reschedule(node)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> HostScheduling:
    config.option.loadscopereorder = False  # in the order of pytest_collection_modifyitems, not by the number of tests
    return HostScheduling(config, log)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Show a failure at once; pytest itself shows it at the end."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\nFAILED {report.nodeid} ({report.when})\n{report.longreprtext}", file=sys.__stderr__, flush=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests in the order of _FIRST, if several workers share them.

    A single process keeps the order of its arguments. In the machine for ipvs mode, the contract's proxy runs until the
    end, and would hold the scheduler that other tests unload.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return

    def place(item: pytest.Item) -> int:
        matching = [prefix for prefix in _FIRST if item.nodeid.startswith(prefix)]
        return _FIRST.index(max(matching, key=len)) if matching else len(_FIRST)

    items.sort(key=place)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(50_000)  # of 700, searching takes a sixth of the time of tests that compute
    gc.enable()


def pytest_sessionstart(session: pytest.Session) -> None:
    lab.prepare()


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Every async test runs on both event loops."""
    return {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority's certificate, and the keys and certificates of a server and of a client."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True, timeout=30)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=authority")
    for name, subject in (("server", "/CN=kube-apiserver"), ("client", "/O=system:nodes/CN=system:node:node-1")):
        openssl(
            *("req", "-x509", *key, "-keyout", f"{name}.key", "-out", f"{name}.crt", "-subj", subject),
            *("-CA", "ca.crt", "-CAkey", "ca.key", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-addext", "basicConstraints=critical,CA:FALSE"),
        )
    return folder


@pytest.fixture(scope="module", name="lab")
def lab_of_a_module() -> Iterator[lab.Lab]:
    with lab.Lab() as made:
        yield made


@pytest.fixture(scope="module")
def host(lab: lab.Lab) -> lab.Host:
    """A host of its own for rules that are loaded for real."""
    return lab.add("rules")
