"""Measures cost by number of Services: rules, time to load all and to change one, and a new connection.

Each mode of this proxy has a separate node for this. Services are added to the existing ones. The time counts from when
their manifests are in the folder until the last one answers a client.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

from userspace_proxy.compare.loads import one_after_another
from userspace_proxy.compare.meters import process_cpu_s
from userspace_proxy.compare.modes import ComparedMode, manifests_of
from userspace_proxy.compare.nodes import ModeNode
from userspace_proxy.lab import HTTP_PORT, ask, service, wait_until

SIZES = (10, 100, 1_000, 5_000, 10_000)
_FIRST = 10  # Services with lower numbers belong to the loads
_PROBE = 9  # the Service whose endpoint changes
_TURNS = 15
_DIALLED = 20  # number of dialled Services, spread over all
_CHANGES = 5
_ANSWER_TIMEOUT_S = 0.25
_LOAD_TIMEOUT_S = 120.0
_POLL_S = 0.002
_TELLING = 1_000  # from this number of Services on, the load time predicts that of more


def scale(
    mode: ComparedMode, node: ModeNode, direct: ModeNode, sizes: Sequence[int], seconds: float, budget_s: float
) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield (size, figures) for as many *sizes* as *budget_s* allows; *node* is new and used for this mode only.

    New connections are measured in turns with connections over *direct*, which has no Services, for *seconds* each.
    """
    mode.start(node)
    node.wait_until_it_serves()
    _write(node, "probe", [_manifest(node, "probe", _PROBE, [0])])
    _until(lambda: _answer(node, _PROBE) == "pod1", "the Service that changes")
    give_up_at = time.monotonic() + budget_s
    fixed_s = load_s = 0.0
    last = sizes[0]
    for size in sizes:
        ahead_s = load_s * size / last if last >= _TELLING else 0.0
        if time.monotonic() + fixed_s + ahead_s > give_up_at:
            return
        started_at = time.monotonic()
        figures = _measure(node, size, direct, seconds)
        load_s, last = figures["load_s"], size
        fixed_s = time.monotonic() - started_at - load_s
        yield size, figures


def _measure(node: ModeNode, size: int, direct: ModeNode, seconds: float) -> dict[str, float]:
    manifests = [_manifest(node, f"many-{number}", _FIRST + number, [0, 2]) for number in range(size)]
    pids = node.pids
    cpu_before = process_cpu_s(pids)
    _write(node, "many", manifests)
    load_s = _until(lambda: _answer(node, _FIRST + size - 1), f"the last of {size:,} Services")
    time.sleep(0.1)
    load_cpu_s = process_cpu_s(pids) - cpu_before
    change_s = statistics.median(_change(node, turn) for turn in range(_CHANGES))
    spread = [(node.service_ip(_FIRST + index * (size - 1) // (_DIALLED - 1)), 80) for index in range(_DIALLED)]
    dialled, without = [], []
    for turn in range(_TURNS):
        first = turn * _DIALLED // _TURNS  # a turn may be too short to dial all of them
        in_turn = [*spread[first:], *spread[:first]]
        dialled.append(statistics.median(one_after_another(node, in_turn, seconds / _TURNS)))
        without.append(statistics.median(one_after_another(direct, [(direct.pod_ips[0], HTTP_PORT)], seconds / _TURNS)))
    # Compare turn by turn, so that a temporarily slow machine affects both.
    added = [(here - there) * 1000 for here, there in zip(dialled, without, strict=True)]
    lower, _, upper = statistics.quantiles(added, n=4)
    return {
        "rules": count_rules(node),
        "load_s": load_s,
        "load_cpu_s": load_cpu_s,
        "change_ms": change_s * 1000,
        "new_connection_ms": statistics.median(dialled),
        "added_us": statistics.median(added),
        "spread_us": upper - lower,
    }


def _change(node: ModeNode, turn: int) -> float:
    """Return the seconds from the probe's manifest to the first connection at its new endpoint."""
    index = (2, 0)[turn % 2]
    _write(node, "probe", [_manifest(node, "probe", _PROBE, [index])])
    return _until(lambda: _answer(node, _PROBE) == f"pod{index + 1}", "the changed Service")


def count_rules(node: ModeNode) -> int:
    """Return the number of rules on the node, in nftables and in legacy iptables tables."""
    listed = node.host.run("nft", "-a", "list", "ruleset", timeout_s=60).stdout
    containers = ("table ", "chain ", "set ", "map ")
    own = 1  # the rule of node.rules
    count = sum(" # handle " in line and not line.lstrip().startswith(containers) for line in listed.splitlines()) - own
    version = node.host.run("iptables", "--version", check=False).stdout
    if "legacy" in version:
        count += sum(line.startswith("-A") for line in node.host.run("iptables-save", timeout_s=60).stdout.splitlines())
    return count


def _manifest(node: ModeNode, name: str, number: int, pods: list[int]) -> str:
    return service(name, node.service_ip(number), [node.pod_ips[index] for index in pods])


def _write(node: ModeNode, name: str, manifests: list[str]) -> None:
    folder = manifests_of(node)
    temporary = folder / f".{name}.new"
    temporary.write_text("".join(manifests))
    temporary.replace(folder / f"{name}.yaml")


def _answer(node: ModeNode, number: int) -> str:
    return ask(node.client, node.service_ip(number), 80, timeout_s=_ANSWER_TIMEOUT_S)


def _until(condition: Callable[[], object], what: str) -> float:
    return wait_until(condition, f"{what} did not come up", timeout_s=_LOAD_TIMEOUT_S, poll_s=_POLL_S)
