"""Tests run inside of namespaces of their own, so that real rules and real hosts harm nobody.

`pytest` started anywhere moves itself there first: as root, or as a plain user with user namespaces.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import hypothesis
import pytest
import uvloop

from tests.fakes import FakeClock
from userspace_proxy import lab

# However busy the machine is: time is no reason to fail.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")

_INSIDE = "USERSPACE_PROXY_TESTS_IN_NAMESPACES"


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get(_INSIDE):
        return
    capture = config.pluginmanager.getplugin("capturemanager")
    if capture is not None:
        capture.suspend_global_capture(in_=True)
    command = lab.command_in_namespaces([sys.executable, "-m", "pytest", *sys.argv[1:]])
    os.execvpe(command[0], command, {**os.environ, _INSIDE: "1"})  # noqa: S606 - a list, no shell


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
