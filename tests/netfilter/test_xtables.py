"""Where the kernel has no tables of iptables, its tools are not run at all."""

from collections.abc import Iterator

import pytest

from userspace_proxy.lab import Host, Lab
from userspace_proxy.netfilter import xtables


@pytest.fixture
def fresh(lab: Lab) -> Iterator[Host]:
    host = lab.add("fresh")
    yield host
    lab.remove(host)


@pytest.mark.parametrize("variant", ["", "-legacy"])
def test_families_are_in_use_once_there_are_tables_of_theirs(fresh: Host, variant: str) -> None:
    if fresh.run(f"iptables{variant}-save", check=False).returncode:
        pytest.skip("this kernel has no legacy iptables")
    with fresh.inside():
        fresh.run("nft", "add table ip ours; add table ip6 ours; add table inet filter")
        assert xtables.families_in_use() == []

        fresh.run(f"ip6tables{variant}", "-t", "nat", "-N", "THEIRS")
        assert xtables.families_in_use() == [(6, "ip6tables")]

        fresh.run(f"iptables{variant}", "-t", "mangle", "-N", "THEIRS")
        assert xtables.families_in_use() == [(4, "iptables"), (6, "ip6tables")]
