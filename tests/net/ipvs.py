"""A proxy in ipvs mode, for tests on a kernel that has IPVS."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tests.net.world import Proxy, documents, endpoints, service
from userspace_proxy.lab import ServiceLab


class IpvsProxy(Proxy):
    """The same in ipvs mode."""

    def run_arguments(self) -> list[str]:
        return [*super().run_arguments(), "--proxy-mode", "ipvs"]

    def servers(self) -> str:
        return self.node.run("ipvsadm", "-Sn").stdout

    def give(self, name: str, cluster_ip: str, *pods: str, extra: str = "") -> None:
        self.apply(name, documents(service(name, cluster_ip, extra=extra), endpoints(name, *pods)))


@contextlib.contextmanager
def fresh_ipvs_proxy(world: ServiceLab, folder: Path) -> Iterator[IpvsProxy]:
    """Yield a proxy that its test starts; at the end `cleanup` removes all of it."""
    one = IpvsProxy(world, folder)
    yield one
    print(one.log())  # noqa: T201 - pytest shows it where the test failed
    if one.process is not None and one.process.poll() is None:
        one.process.kill()
        one.process.wait(20)
    world.node.run(*one.command("cleanup"))
    assert one.servers() == ""
    assert "kube-ipvs0" not in world.node.ip("link", "show")
