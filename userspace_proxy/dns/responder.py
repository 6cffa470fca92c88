"""Answers to questions about the cluster domain. Each is packed once, and kept until it changes. No I/O."""

from collections import defaultdict
from collections.abc import Iterable

from userspace_proxy.dns import messages
from userspace_proxy.dns.messages import (
    AAAA,
    ANY,
    CNAME,
    NXDOMAIN,
    SERVFAIL,
    SRV,
    A,
    PackedAnswer,
    Question,
    Record,
    pack_answer,
)
from userspace_proxy.dns.zone import Labels, Zone
from userspace_proxy.model.dns_names import ServiceNames
from userspace_proxy.model.names import NamespacedName

_CACHED_MAX = 16_384
_CACHED_MAX_BYTES = 32 << 20
_ALIASES_MAX = 8
# Between the first records of answers that have only a part of all: a prime, so that each gets its turn.
_STEP = 997


class Alias(Exception):  # noqa: N818 - no error
    """A chain of CNAME ``records`` leads to ``target``, a name outside of the cluster domain."""

    def __init__(self, records: list[Record], target: str) -> None:
        super().__init__(target)
        self.records = records
        self.target = target


class Responder:
    """Answers queries from a zone. ``is_synced``: the zone is complete; before that, a missing name may still exist.

    ``cut``: number of answers with records left out, because a message has no room for all of them. ``hits``,
    ``misses``: of the cache.
    """

    def __init__(self, zone: Zone) -> None:
        self.zone = zone
        self.is_synced = False
        self.cut = 0
        self.hits = 0
        self.misses = 0
        self._answers: dict[bytes, PackedAnswer] = {}
        self._bytes = 0
        self._keys_of: dict[Labels, list[bytes]] = defaultdict(list)  # by what `Zone.owner` returns

    def update(self, service: NamespacedName, names: ServiceNames | None) -> None:
        """Replace the names of *service*; None if it was deleted."""
        for owner in self.zone.set(service, names):
            for key in self._keys_of.pop(owner, ()):
                self._answers.pop(key, None)

    def answer(self, question: Question) -> PackedAnswer | None:
        """Return the answer to *question*, or None if its name is not in the cluster domain.

        Raises:
            Alias: the name has a CNAME record that leads outside of the cluster domain.
        """
        key = question.key
        answer = self._answers.get(key)
        if answer is None:
            self.misses += 1
            name = question.labels()
            if name not in self.zone and self.zone.find(name) is None:
                return None
            answer, names = self._work_out(name, question.type)
            if answer.rcode == NXDOMAIN and not self.is_synced:
                return PackedAnswer(SERVFAIL)
            self._keep(key, map(self.zone.owner, names), answer)
        else:
            self.hits += 1
            answer = self._next_turn(key, answer)
        if answer.surplus:
            self.cut += 1
            return messages.fitting(answer, self.cut * _STEP % len(answer.surplus))
        return answer

    def _next_turn(self, key: bytes, answer: PackedAnswer) -> PackedAnswer:
        """Return the kept *answer* with another address first than the last time, if it has nothing but addresses."""
        if answer.each_bytes and not answer.surplus:
            answer = self._answers[key] = answer.turned(1)
        return answer

    def _keep(self, key: bytes, owners: Iterable[Labels], answer: PackedAnswer) -> None:
        self._bytes += len(answer.body) + sum(map(len, answer.surplus))
        if len(self._answers) >= _CACHED_MAX or self._bytes > _CACHED_MAX_BYTES:
            self._answers.clear()
            self._keys_of.clear()
            self._bytes = 0
        self._answers[key] = answer
        for owner in owners:
            self._keys_of[owner].append(key)

    def _work_out(self, name: Labels, kind: int) -> tuple[PackedAnswer, list[Labels]]:
        """Return the answer, and the names that it depends on."""
        records: list[Record] = []
        names = [name]
        owner = ""
        values = self.zone.find(name)
        while values and CNAME in values and kind not in (CNAME, ANY):
            target = str(values[CNAME][0])
            records.append(Record(owner, CNAME, target))
            owner, name = target, tuple(target.lower().split("."))
            if name not in self.zone:
                raise Alias(records, target)
            if len(records) > _ALIASES_MAX:
                return PackedAnswer(SERVFAIL), names
            names.append(name)
            values = self.zone.find(name)
        kinds = (values or ()) if kind == ANY else (kind,)
        found = [Record(owner, each, value) for each in kinds for value in (values or {}).get(each, ())]
        if not found:
            rcode = NXDOMAIN if values is None else messages.NOERROR
            return pack_answer(rcode, messages.AUTHORITATIVE, records, [self.zone.soa]), names
        targets = dict.fromkeys(record.value[3] for record in found if record.type == SRV)  # type: ignore[misc]
        additionals = (
            Record(target, each, ip)
            for target in targets
            for each, ips in (self.zone.find(tuple(target.lower().split("."))) or {}).items()
            for ip in ips
        )
        answer = pack_answer(messages.NOERROR, messages.AUTHORITATIVE, records + found, additionals=additionals)
        if kind in (A, AAAA) and len(found) > 1 and not records:
            each_bytes = len(answer.surplus[0]) if answer.surplus else len(answer.body) // len(found)
            answer = answer._replace(each_bytes=each_bytes)
        return answer, names
