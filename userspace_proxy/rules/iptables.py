"""Redirects as iptables-restore text, for nodes without nftables. Pure.

Chains of ours hold every rule; the built-in chains get one jump each. iptables matches rule by rule, so a
new connection costs more the more services there are: that is the language, not a choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from userspace_proxy.interfaces import OWN_MARK, Capture, Redirects
from userspace_proxy.model.names import L4Protocol
from userspace_proxy.rules.nft import LOCAL_ADDRESS4, LOCAL_ADDRESS6

CHAIN = "USERSPACE-PROXY"
GUARD = "USERSPACE-PROXY-GUARD"

# Table -> built-in chain -> the jump to ours, as iptables-save prints it behind the chain's name.
_JUMPS = {
    "nat": {
        "PREROUTING": f"-j {CHAIN}",
        "OUTPUT": f"-m mark ! --mark {OWN_MARK:#x}/{OWN_MARK:#x} -j {CHAIN}",
    },
    "filter": {"INPUT": f"-m conntrack --ctstate NEW -j {GUARD}"},
}
_PORTS_A_MATCH = 15  # as many as -m multiport takes


def restore(redirects: Redirects, family: int, saved: str) -> str:
    """Return the input for ``iptables-restore --noflush`` (4) or ``ip6tables-restore`` (6).

    *saved* is what iptables-save printed: a jump that is there already is not added again, one that is
    not the first of its chain is moved there.
    """
    return "".join(
        (
            "*nat\n",
            f":{CHAIN} - [0:0]\n",
            *_lines(_missing_jumps("nat", saved)),
            *_lines(_redirects(redirects, family)),
            "COMMIT\n",
            "*filter\n",
            f":{GUARD} - [0:0]\n",
            *_lines(_missing_jumps("filter", saved)),
            *_lines(_guards(redirects, family)),
            "COMMIT\n",
        )
    )


def removal(saved: str) -> str:
    """Return the input that removes every chain and jump of ours that *saved* shows; "" where there is none."""
    text = ""
    for table, chain in (("nat", CHAIN), ("filter", GUARD)):
        ours = [line for line in _section(saved, table) if is_ours(line)]
        if not ours:
            continue
        jumps = [line.replace("-A ", "-D ", 1) for line in ours if not line.startswith((":", f"-A {chain} "))]
        text += f"*{table}\n:{chain} - [0:0]\n{''.join(_lines(jumps))}-X {chain}\nCOMMIT\n"
    return text


def is_ours(line: str) -> bool:
    """Return whether *line* of iptables-save is a chain, rule or jump of ours; a comment that names us is not."""
    words = line.split()
    if words[:1] in ([f":{CHAIN}"], [f":{GUARD}"]):
        return True
    return words[:1] == ["-A"] and (words[1] in (CHAIN, GUARD) or words[-1] in (CHAIN, GUARD))


def ours(saved: str) -> tuple[str, ...]:
    """Return our rules and jumps in *saved*, without counters: equal before and after means intact."""
    return tuple(line for line in saved.splitlines() if line.startswith("-A") and is_ours(line))


def rules_in(script: str) -> int:
    """Return how many lines `ours` has to find once *script* (made by `restore`) is loaded."""
    jumps = sum(len(chains) for chains in _JUMPS.values())
    return jumps + sum(line.startswith((f"-A {CHAIN} ", f"-A {GUARD} ")) for line in script.splitlines())


def _section(saved: str, table: str) -> Iterator[str]:
    inside = False
    for line in saved.splitlines():
        if line.startswith("*"):
            inside = line == f"*{table}"
        elif inside:
            yield line


def _missing_jumps(table: str, saved: str) -> Iterator[str]:
    lines = list(_section(saved, table))
    for chain, jump in _JUMPS[table].items():
        rules = [line for line in lines if line.startswith(f"-A {chain} ")]
        wanted = f"-A {chain} {jump}"
        if rules[:1] == [wanted]:
            continue
        yield from (f"-D {chain} {jump}" for line in rules if line == wanted)
        yield f"-I {chain} 1 {jump}"


def _redirects(redirects: Redirects, family: int) -> Iterator[str]:
    # Virtual IPs first: a node port is looked for only where the packet is for this node itself.
    for portal, port in sorted(redirects.ports.items(), key=lambda item: item[0].ip is None):
        if portal.ip is not None and (":" in portal.ip) != (family == 6):
            continue
        protocol = portal.protocol.lower()
        # In the order in which iptables-save prints it.
        where = f"-d {portal.ip}/{32 if family == 4 else 128} -p {protocol}"
        if portal.ip is None:
            where = f"-p {protocol} -m addrtype --dst-type LOCAL"
        name = redirects.names.get(portal)
        said = f' -m comment --comment "{name}"' if name else ""
        verdict = f"-j REDIRECT --to-ports {port}"
        if redirects.capture is Capture.ADDRESS:
            address = LOCAL_ADDRESS4 if family == 4 else f"[{LOCAL_ADDRESS6}]"
            verdict = f"-j DNAT --to-destination {address}:{port}"
        yield f"-A {CHAIN} {where} -m {protocol} --dport {portal.port}{said} {verdict}"


def _guards(redirects: Redirects, family: int) -> Iterator[str]:
    yield f"-A {GUARD} -m conntrack --ctstate DNAT -j RETURN"
    unreachable = "icmp-port-unreachable" if family == 4 else "icmp6-port-unreachable"
    for protocol, answer in ((L4Protocol.TCP, "tcp-reset"), (L4Protocol.UDP, unreachable)):
        ports = sorted({port for portal, port in redirects.ports.items() if portal.protocol is protocol})
        for part in _parts(ports):
            numbers = ",".join(map(str, part))
            name = protocol.lower()
            yield f"-A {GUARD} -p {name} -m multiport --dports {numbers} -j REJECT --reject-with {answer}"


def _parts(ports: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(ports), _PORTS_A_MATCH):
        yield ports[start : start + _PORTS_A_MATCH]


def _lines(rules: Iterable[str]) -> Iterator[str]:
    return (f"{rule}\n" for rule in rules)
