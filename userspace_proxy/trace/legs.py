"""Groups the kernel's trace messages into legs: one packet each, from hook to hook. Pure.

The chain of a rule in the tracer's table says why a packet is followed. The tracer's last chain at each hook proves
that the packet passed the hook, and with which addresses.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from userspace_proxy.trace.elements import Elements
from userspace_proxy.trace.nftrace import Message
from userspace_proxy.trace.rulebook import ChainRules, Rulebook
from userspace_proxy.trace.values import Ends, Hook, Leg, MatchedRule, PacketRole, Visit

TABLE = "userspace_proxy_trace"
FOLLOWED = {
    "client_in": PacketRole.CLIENT,
    "client_out": PacketRole.CLIENT,
    "dial_out": PacketRole.DIAL,
    "reply_in": PacketRole.REPLY,
    "answer_in": PacketRole.ANSWER,
    "answer_out": PacketRole.ANSWER,
}
AFTER = "after_"
_NEXT = {
    "PREROUTING": ("INPUT", "FORWARD"),
    "INPUT": (),
    "FORWARD": ("POSTROUTING",),
    "OUTPUT": ("POSTROUTING",),
    "POSTROUTING": ("PREROUTING",),
}
_UNKNOWN = "a rule that was replaced meanwhile"


@dataclass(slots=True)
class _MessageGroup:
    """One packet in one base chain, with its trace messages there."""

    packet: int
    begin: Message
    ends: Ends
    messages: list[Message] = field(default_factory=list)

    @property
    def is_ours(self) -> bool:
        return self.begin.table == TABLE

    @property
    def has_matched(self) -> bool:
        return any(message.kind == "rule" for message in self.messages)


@dataclass(slots=True)
class _Hook:
    name: str
    before: Ends
    devices: tuple[int, int]
    groups: list[_MessageGroup] = field(default_factory=list)
    after: Ends | None = None
    is_over: bool = False


@dataclass(slots=True)
class _Leg:
    role: PacketRole
    what: str
    now: Ends
    hooks: list[_Hook] = field(default_factory=list)

    def hook(self, name: str, begin: Message) -> _Hook:
        """Return the packet's current hook; add one if the previous hook is finished."""
        if not self.hooks or self.hooks[-1].is_over or self.hooks[-1].name != name:
            if self.hooks and not self.hooks[-1].is_over and begin.ends is not None:  # IPVS changed it in between
                self.now = begin.ends
            self.hooks.append(_Hook(name, self.now, (begin.iif, begin.oif)))
        return self.hooks[-1]

    def goes_on(self, name: str, group: _MessageGroup) -> bool:
        """Return whether *group*, at the hook *name*, continues this packet's path."""
        if not self.hooks:
            return False
        last, ends = self.hooks[-1], group.ends
        if name == last.name and not last.is_over:
            return self.now == ends
        if last.name == "POSTROUTING" and last.devices[1] != group.begin.iif:  # only loopback returns
            return False
        if last.is_over:
            return self.now == ends and name in _NEXT[last.name]
        # IPVS takes packets at INPUT and re-sends them from OUTPUT to another destination.
        return last.name == "INPUT" and name == "OUTPUT" and self.now.sender == ends.sender


def legs(
    messages: Iterable[Message], rulebook: Rulebook, devices: Mapping[int, str], elements: Elements
) -> tuple[Leg, ...]:
    """Return the paths of the followed packets, in order of their beginning.

    The kernel's packet id is not enough: a packet's id may change on its path, and several packets may share one in
    turn.
    """
    found: list[_Leg] = []
    current: dict[int, _Leg] = {}
    for group in _groups(messages):
        name = _hook_name(group, rulebook)
        again = next((leg for leg in found if leg.goes_on(name, group)), None)
        if again is not None:
            current[group.packet] = again
        elif group.is_ours and group.begin.chain in FOLLOWED and group.has_matched:
            leg = current[group.packet] = _Leg(FOLLOWED[group.begin.chain], group.begin.what, group.ends)
            found.append(leg)
        if group.packet in current:
            _follow(current[group.packet], name, group)
    return tuple(_finished(leg, rulebook, devices, elements) for leg in found)


def _hook_name(group: _MessageGroup, rulebook: Rulebook) -> str:
    begin = group.begin
    if not group.is_ours:
        return rulebook.chain(begin.family, begin.table, begin.chain).hook.upper() or "?"
    if begin.chain in FOLLOWED:
        return "PREROUTING" if begin.chain.endswith("_in") else "OUTPUT"
    return begin.chain.partition("_")[2].upper()


def _follow(leg: _Leg, name: str, group: _MessageGroup) -> None:
    hook = leg.hook(name, group.begin)
    if not group.is_ours:
        hook.groups.append(group)
    elif group.begin.chain.startswith(AFTER):
        hook.after = leg.now = group.ends
        hook.devices = (group.begin.iif, group.begin.oif)
        hook.is_over = True


def _groups(messages: Iterable[Message]) -> list[_MessageGroup]:
    found: list[_MessageGroup] = []
    current: dict[int, _MessageGroup] = {}
    for message in messages:
        if message.ends is not None:
            current[message.packet] = _MessageGroup(message.packet, message, message.ends)
            found.append(current[message.packet])
        if message.packet in current:
            current[message.packet].messages.append(message)
    return found


def _finished(leg: _Leg, rulebook: Rulebook, devices: Mapping[int, str], elements: Elements) -> Leg:
    hooks = []
    for hook in leg.hooks:
        ends = [*(group.ends for group in hook.groups[1:]), hook.after]
        visits = tuple(_visit(*pair, rulebook, elements) for pair in zip(hook.groups, ends, strict=False))
        iif, oif = (devices.get(index, f"device {index}") if index else "" for index in hook.devices)
        hooks.append(Hook(hook.name, (iif, oif), visits, hook.before, hook.after))
    return Leg(leg.role, leg.what, tuple(hooks))


def _visit(group: _MessageGroup, after: Ends | None, rulebook: Rulebook, elements: Elements) -> Visit:
    begin = group.begin
    base = rulebook.chain(begin.family, begin.table, begin.chain)
    walk = _Walk(base, rulebook, elements, group.ends)
    steps = tuple(walk.steps(group.messages))
    last = group.messages[-1]
    by_policy = last.kind == "policy" or last.verdict not in ("accept", "drop", "stolen", "queue")
    end = last.verdict if not by_policy or last.kind == "policy" else "accept"
    skipped = walk.rest() if by_policy else 0
    return Visit(begin.family, begin.table, begin.chain, base.kind, steps, end, by_policy, skipped, group.ends, after)


class _Walk:
    """Walks from rule to rule through a base chain and the chains it jumps to; counts rules that did not match."""

    def __init__(self, base: ChainRules, rulebook: Rulebook, elements: Elements, ends: Ends) -> None:
        self._rulebook, self._elements, self._ends = rulebook, elements, ends
        self._family, self._table = base.family, base.table
        self._stack: list[tuple[ChainRules, int]] = [(base, 0)]  # each chain with the number of rules passed
        self._skipped = 0

    def steps(self, messages: Iterable[Message]) -> Iterator[MatchedRule]:
        for message in messages:
            if message.kind == "rule":
                yield self._step(message)

    def rest(self) -> int:
        """Return the number of rules that did not match after the last step."""
        while self._stack:
            self._leave()
        return self._skipped

    def _leave(self) -> None:
        chain, behind = self._stack.pop()
        self._skipped += max(0, len(chain.rules) - behind)

    def _step(self, message: Message) -> MatchedRule:
        while len(self._stack) > 1 and self._stack[-1][0].name != message.chain:
            self._leave()
        chain, behind = self._stack.pop()
        handles = list(chain.rules)
        at = handles.index(message.handle) if message.handle in chain.rules else behind
        self._skipped += max(0, at - behind)
        depth = len(self._stack)
        text = chain.rules.get(message.handle, _UNKNOWN)
        element = self._elements.text(text, self._family, self._table, self._ends)
        step = MatchedRule(message.chain, text, message.verdict, message.to, self._skipped, element, depth)
        self._skipped = 0
        # After a goto or return, the rest of this chain is not evaluated.
        over = message.verdict in ("goto", "return")
        self._stack.append((chain, len(chain.rules) if over else at + 1))
        if message.to:
            self._stack.append((self._rulebook.chain(self._family, self._table, message.to), 0))
        return step
