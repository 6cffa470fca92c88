"""`--proxy-mode ipvs` if the kernel refuses, and repairs of what another program changed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.modes.redirect_cases import name
from tests.modes.translation_cases import HERE, NEAR4, PODS, by_name, translation
from tests.net.ipvs import IpvsProxy, fresh_ipvs_proxy
from tests.net.world import POD1, answers, wait_until
from userspace_proxy.lab import Host, ServiceLab
from userspace_proxy.model.service import ServicePort
from userspace_proxy.modes.ipvs.loader import IpvsTables
from userspace_proxy.modes.ipvs.table import IpvsTable
from userspace_proxy.modes.kernel_rules import NodeFacts, RuleUpdate

pytestmark = pytest.mark.ipvs

REFUSED = "IPVS refused: add server (rr) at TCP 10.96.9.30:80: No such file or directory"
WELL_AGAIN = "our rules are as they were loaded again"


@pytest.fixture
def proxy(world: ServiceLab, tmp_path: Path) -> Iterator[IpvsProxy]:
    with fresh_ipvs_proxy(world, tmp_path) as one:
        yield one


@contextlib.contextmanager
def without_schedulers(node: Host) -> Iterator[None]:
    """Unload the scheduler modules, and prevent that they are loaded again."""
    knob = Path("/proc/sys/kernel/modprobe")
    loader = knob.read_text()
    knob.write_text("/bin/false")
    try:
        node.run("sh", "-c", "until ipvsadm -C && rmmod ip_vs_rr; do :; done")
        yield
    finally:
        knob.write_text(loader)


def test_a_load_that_is_refused_for_long_is_named_once_and_so_is_its_end(proxy: IpvsProxy, world: ServiceLab) -> None:
    proxy.give("before", "10.96.9.31", POD1)
    proxy.start()
    proxy.delete("before")
    wait_until(lambda: proxy.servers() == "", "nothing is served")
    with without_schedulers(world.node):
        proxy.give("web", "10.96.9.30", POD1)
        wait_until(lambda: REFUSED in proxy.log(), "it is refused")
        for verb in ("add", "del"):  # what has it looked after again
            world.node.ip("addr", verb, "10.9.9.9/32", "dev", "lo")
        wait_until(lambda: proxy.metric("userspace_proxy_sync_failing_seconds") > 3, "it is refused for long")
        _, health = proxy.get("/healthz", 10256)

    assert REFUSED in health
    wait_until(lambda: answers(world.client, "10.96.9.30", 80) == "pod1", "it is served when it can be", 30)
    wait_until(lambda: "the rules could be loaded again" in proxy.log(), "that is said")
    assert proxy.log().count(REFUSED) == 1
    assert "changed by another program" not in proxy.log()


def test_a_repair_that_is_refused_for_long_is_named_once_and_so_is_its_end(proxy: IpvsProxy, world: ServiceLab) -> None:
    proxy.give("web", "10.96.9.30", POD1)
    proxy.start()
    with without_schedulers(world.node):
        wait_until(lambda: proxy.metric("userspace_proxy_rule_repair_failing_seconds") > 3, "it is refused for long")
        _, health = proxy.get("/healthz", 10256)
        log = proxy.log()  # a try that is under way when schedulers come back may meet another refusal

    assert REFUSED in health
    _, *after = log.split("IPVS refused")
    assert len(after) == 1
    wait_until(lambda: answers(world.client, "10.96.9.30", 80) == "pod1", "it is served when it can be", 30)
    wait_until(lambda: WELL_AGAIN in proxy.log(), "that is said")
    assert "changed by another program" not in proxy.log().partition("IPVS refused")[2]
    assert proxy.metric("userspace_proxy_rule_repair_failing_seconds") == 0


def test_a_repair_loads_only_what_another_program_changed(world: ServiceLab) -> None:
    table = IpvsTable.name.split()

    def rules() -> str:
        return world.node.run("nft", "--handle", "list", "chain", *table, "refuse").stdout

    async def scenario() -> None:
        tables = IpvsTables()
        await tables.prepare()
        try:
            web = translation(ServicePort(name("ns/a"), 80, ("10.96.9.32",)), NEAR4)
            await tables.load(RuleUpdate(by_name([web]), (), NodeFacts(HERE, PODS)))
            before = rules(), world.node.run("ipvsadm", "-Sn").stdout

            world.node.run("ipvsadm", "-C")
            await tables.reload()
            assert (rules(), world.node.run("ipvsadm", "-Sn").stdout) == before

            world.node.run("nft", "flush", "chain", *table, "refuse")
            await tables.reload()
            assert rules().count("handle") == before[0].count("handle")
            assert world.node.run("ipvsadm", "-Sn").stdout == before[1]
        finally:
            await tables.remove()

    with world.node.inside(), asyncio.Runner() as runner:
        runner.run(scenario())
