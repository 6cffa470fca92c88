"""Finds the rule of another program that drops a Service's packets, or sends them elsewhere.

Rules are evaluated for the first packet of a new connection, in three values: a match that depends on what is not
known (an interface, a mark, a named set) is neither true nor false. Only what is certain is reported.
"""

import contextlib
import ipaddress
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from userspace_proxy.errors import SyncError
from userspace_proxy.host.tool import is_installed, parsed, run_tool

Expression = dict[str, Any]  # as `nft --json` shows one part of a rule
DROPS, REDIRECTS = frozenset({"drop", "reject"}), frozenset({"dnat", "redirect"})
# Tables that iptables on nf_tables keeps: only iptables can read all of their rules.
_IPTABLES = ("filter", "nat", "mangle", "raw")
_UNKNOWN = object()
_ABSENT = object()  # a field that the packet does not have
_NEUTRAL = {"counter", "log", "mangle", "notrack", "ct helper", "flow", "meta", "secmark", "quota"}
# Modules of iptables whose options are read below, or that match nothing.
_MODULES = {"tcp", "udp", "conntrack", "state", "multiport", "comment"}
_TARGETS = {"DROP", "REJECT", "ACCEPT", "RETURN", "DNAT", "REDIRECT"}
# Options of iptables that compare, and what nft compares for them.
_COMPARED = {
    "-s": ("payload", "saddr"),
    "-d": ("payload", "daddr"),
    "-p": ("meta", "l4proto"),
    "-i": ("meta", "iifname"),
    "-o": ("meta", "oifname"),
    "--dport": ("payload", "dport"),
    "--dports": ("payload", "dport"),
    "--ctstate": ("ct", "state"),
    "--state": ("ct", "state"),
}
_DEPTH_MAX = 16
# The end of a chain's evaluation, without a verdict.
_RETURNS = "return"
_OUR_TABLES, _OUR_CHAINS = "userspace_proxy", ("USERSPACE-PROXY", "KUBE-")
_IPTABLES_PRIORITIES = {"filter": 0, "nat": -100}
# A mode may have 100,000 rules in the table nat: only the chains that packets meet first are read there.
_READ = (("filter",), ("nat", "PREROUTING"), ("nat", "OUTPUT"))


class Packet(NamedTuple):
    """The first packet of a connection, at one hook.

    ``family``: ``ip`` or ``ip6``. ``source``, ``destination``: "" if not known. ``port``: the destination port.
    ``is_translated``: NAT has changed the destination.
    """

    traffic: str
    hook: str
    family: str
    protocol: str
    source: str
    destination: str
    port: int
    is_translated: bool = False


@dataclass(slots=True)
class _Chain:
    """``rules``: the expressions of each rule. ``hook`` and ``type``: "" if other chains jump to it."""

    title: str
    rules: list[list[Expression]] = field(default_factory=list)
    hook: str = ""
    type: str = ""
    priority: int = 0
    policy: str = "accept"


@dataclass(frozen=True, slots=True)
class ForeignRules:
    """The rules of other programs. ``nat_priorities``: those of our own NAT chains, by hook."""

    chains: Mapping[str, _Chain]
    nat_priorities: Mapping[str, int]

    def against(self, packet: Packet) -> tuple[str, str] | None:
        """Return which rules drop *packet* or send it elsewhere, and the fix; None if none is certain to do so."""
        for chain in self.chains.values():
            if chain.hook != packet.hook or (chain.type == "filter" and _comes_after_nat(chain)):
                continue
            if chain.type == "nat":
                is_first = chain.priority < self.nat_priorities.get(chain.hook, chain.priority + 1)
                if is_first and self._verdict(chain, packet, REDIRECTS) in REDIRECTS:
                    reason = f"rules of another program send {packet.traffic} elsewhere: {chain.title}"
                    return reason, "remove these rules, or stop the program that made them"
            elif (self._verdict(chain, packet, DROPS) or chain.policy) in DROPS:
                return f"a firewall of this node drops {packet.traffic}: {chain.title}", _accept(chain, packet)
        return None

    def _verdict(self, chain: _Chain, packet: Packet, ends: Collection[str], depth: int = 0) -> str:
        """Return the verdict of *chain*: one of *ends*, "accept", "unknown", or "" at its end."""
        for rule in chain.rules if depth < _DEPTH_MAX else ():
            if verdict := self._rule_verdict(chain, rule, packet, ends, depth):
                return verdict.removeprefix(_RETURNS)
        return ""

    def _rule_verdict(
        self, chain: _Chain, rule: Sequence[Expression], packet: Packet, ends: Collection[str], depth: int
    ) -> str:
        """Return the verdict of one rule of *chain*, "" if the next rule follows. No uncertain one of *ends* counts."""
        is_certain = True
        for expression in rule:
            kind, content = next(iter(expression.items()))
            if verdict := self._end(chain, kind, content, packet, ends, depth):
                return verdict if is_certain else "" if verdict in ends else "unknown"
            matches = _matches(content, packet) if kind == "match" else kind in _NEUTRAL or None
            if matches is False:
                return ""
            is_certain = is_certain and bool(matches)
        return ""

    def _end(self, chain: _Chain, kind: str, content: Any, packet: Packet, ends: Collection[str], depth: int) -> str:
        """Return the verdict of one statement, "" if evaluation goes on behind it."""
        if kind in ends:
            return kind
        if kind in ("vmap", *DROPS, *REDIRECTS):
            return "unknown"
        if kind not in ("jump", "goto"):
            return {"accept": "accept", "return": _RETURNS}.get(kind, "")
        title = f"{chain.title.rpartition(' ')[0]} {content['target']}"
        if title.rpartition(" ")[2].startswith(_OUR_CHAINS):
            return "unknown" if ends is REDIRECTS else ""
        target = self.chains.get(title)
        verdict = self._verdict(target, packet, ends, depth + 1) if target else ""
        return verdict or (_RETURNS if kind == "goto" else "")


def _matches(match: Expression, packet: Packet) -> bool | None:
    """Return whether *packet* matches, None if that is not known."""
    value = _value(match["left"], packet)
    if value is _ABSENT:
        return False
    found = None if value is _UNKNOWN else _contains(match["right"], value)
    return found if found is None or match.get("op") != "!=" else not found


def _value(left: Any, packet: Packet) -> object:
    """Return the packet's value of the left side of a match."""
    match left:
        case {"payload": {"field": "dport", "protocol": protocol}}:
            return packet.port if protocol in ("th", packet.protocol) else _ABSENT
        case {"payload": {"field": ("protocol" | "nexthdr" | "saddr" | "daddr") as name, "protocol": family}}:
            values = {"saddr": packet.source or _UNKNOWN, "daddr": packet.destination or _UNKNOWN}
            return values.get(name, packet.protocol) if family == packet.family else _ABSENT
        case {"meta": {"key": "l4proto"}}:
            return packet.protocol
        case {"meta": {"key": "nfproto"}}:
            return "ipv6" if packet.family == "ip6" else "ipv4"
        case {"ct": {"dir": _}}:
            return _UNKNOWN
        case {"ct": {"key": "state"}}:
            return "new"
        case {"ct": {"key": "status"}}:
            return "dnat" if packet.is_translated else ""
    return _UNKNOWN


def _contains(right: Any, value: object) -> bool | None:
    """Return whether *value* is in the right side of a match; None if that is a named set."""
    match right:
        case {"set": items}:
            return _contains(items, value)
        case list():
            found = [_contains(item, value) for item in right]
            return True if True in found else None if None in found else False
        case {"prefix": {"addr": address, "len": length}}:
            return ipaddress.ip_address(str(value)) in ipaddress.ip_network(f"{address}/{length}", strict=False)
        case {"range": [low, high]} if isinstance(value, int):
            return int(low) <= value <= int(high)
        case {"range": [low, high]}:
            first, one, last = (ipaddress.ip_address(str(ip)).packed for ip in (low, value, high))
            return first <= one <= last
        case {"elem": {"val": item}}:
            return _contains(item, value)
        case int() | str() if not str(right).startswith("@"):
            return str(right) == str(value)
    return None


def _comes_after_nat(chain: _Chain) -> bool:
    """Return whether packets that *chain* sees at prerouting may have another destination than the client dialled."""
    return chain.hook == "prerouting" and chain.priority >= _IPTABLES_PRIORITIES["nat"]


def _accept(chain: _Chain, packet: Packet) -> str:
    """Return the command that lets packets such as *packet* pass *chain*."""
    tool, _, name = chain.title.partition(" ")
    if tool == "nftables":
        match = "ct status dnat" if packet.is_translated else f"{packet.family} daddr {packet.destination}"
        return f"`nft insert rule {name} {match} accept` lets it pass"
    match = "-m conntrack --ctstate DNAT" if packet.is_translated else f"-d {packet.destination}"
    return f"`{tool} -I {name} {match} -j ACCEPT` lets it pass"


# ---- reading rules


async def read_foreign_rules(family: str) -> ForeignRules:
    """Return the rules of this network namespace for *family* (``ip`` or ``ip6``).

    Raises:
        SyncError: nft cannot list them.
    """
    chains: dict[str, _Chain] = {}
    priorities: dict[str, int] = {}
    listed = parsed(await run_tool("nft", "--json", "--terse", "list", "ruleset")) if is_installed("nft") else None
    items = [(kind, item) for entry in (listed or {}).get("nftables", ()) for kind, item in entry.items()]
    for kind, item in items:
        if kind in ("chain", "rule") and item["family"] in ("inet", family):
            _add_nft(kind, item, chains, priorities)
    tool = "ip6tables" if family == "ip6" else "iptables"
    for table, *chain in _READ if is_installed(tool) else ():
        with contextlib.suppress(SyncError):  # no such table, or rules that are not iptables' own
            for line in (await run_tool(tool, "--table", table, "-S", *chain)).splitlines():
                _add_iptables(tool, table, shlex.split(line), chains)
    return ForeignRules(chains, priorities)


def _add_nft(kind: str, item: Expression, chains: dict[str, _Chain], priorities: dict[str, int]) -> None:
    """Add a chain or rule, except our own and those of iptables."""
    if item["table"].startswith(_OUR_TABLES):
        if item.get("type") == "nat":
            hook, priority = item["hook"], item["prio"]
            priorities[hook] = min(priority, priorities.get(hook, priority))
    elif item["family"] == "inet" or item["table"] not in _IPTABLES:
        title = f"nftables {item['family']} {item['table']} {item['name' if kind == 'chain' else 'chain']}"
        if kind == "rule":
            chains[title].rules.append(item.get("expr", []))
        else:
            hook, of, policy = (item.get(key, "") for key in ("hook", "type", "policy"))
            chains[title] = _Chain(title, [], hook, of, item.get("prio", 0), policy)


def _add_iptables(tool: str, table: str, words: Sequence[str], chains: dict[str, _Chain]) -> None:
    """Add a chain or rule, from a line of ``iptables -S``."""
    what, name, *rest = words
    # A chain's name is once in each table.
    title = f"{tool} {name}" if table == "filter" else f"{tool} --table {table} {name}"
    if what != "-A":
        is_hooked = what == "-P"
        of, hook, policy = (table, name.lower(), rest[0].lower()) if is_hooked else ("", "", "")
        chains[title] = _Chain(title, [], hook, of, _IPTABLES_PRIORITIES[table], policy)
    elif not name.startswith(_OUR_CHAINS):
        chains[title].rules.append(_expressions(rest, "ip6" if tool == "ip6tables" else "ip"))


def _expressions(words: Sequence[str], family: str) -> list[Expression]:
    """Return a rule of iptables as nft would show it."""
    found: list[Expression] = []
    for option, op, value in _options(words):
        if option in _COMPARED:
            found.append(_comparison(option, op, value, family))
        elif option in ("-j", "-g"):
            jump = {"goto" if option == "-g" else "jump": {"target": value}}
            return [*found, {value.lower(): None} if value in _TARGETS else jump]
        elif option != "--comment" and not (option == "-m" and value in _MODULES):
            found.append({"xt": None})
    return found


def _options(words: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yield each option with ``==`` or, after an exclamation mark, ``!=``, and its value, "" for none."""
    for at, word in enumerate(words):
        if word.startswith("-"):
            value = words[at + 1] if at + 1 < len(words) and not words[at + 1].startswith(("-", "!")) else ""
            yield word, "!=" if at and words[at - 1] == "!" else "==", value


def _comparison(option: str, op: str, values: str, family: str) -> Expression:
    """Return the match of an option of iptables and its comma-separated values."""
    kind, key = _COMPARED[option]
    right = [_iptables_value(value) for value in values.split(",")]
    if option in ("-s", "-d"):
        left: Expression = {"payload": {"protocol": family, "field": key}}
    elif kind == "payload":
        left = {"payload": {"protocol": "th", "field": key}}
    else:
        left = {kind: {"key": "status" if option == "--ctstate" and "dnat" in right else key}}
    return {"match": {"op": op, "left": left, "right": right}}


def _iptables_value(text: str) -> Any:
    if "/" in text:
        address, _, length = text.partition("/")
        return {"prefix": {"addr": address, "len": int(length)}}
    low, colon, high = text.partition(":")
    return {"range": [int(low), int(high)]} if colon and low.isdigit() and high.isdigit() else text.lower()
