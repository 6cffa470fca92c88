"""Cluster DNS when a process ends: nothing is left, and names are answered again."""

from __future__ import annotations

from tests.net.test_dns import ARGUMENTS, WEB
from tests.net.world import Proxy


def test_a_crashed_proxy_leaves_nothing_that_cleanup_does_not_remove(fresh_proxy: Proxy) -> None:
    proxy = fresh_proxy
    proxy.apply("web", WEB)
    proxy.start(*ARGUMENTS)
    assert proxy.process is not None
    proxy.process.kill()
    proxy.process.wait(20)

    proxy.node.run(*proxy.command("cleanup"))

    assert not proxy.node.ip("route", "show", "table", "local", "proto", "107")
