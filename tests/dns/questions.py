"""Names of Services, and questions as clients write them."""

from __future__ import annotations

import dns.flags
import dns.message
import dns.rcode

from userspace_proxy.dns.messages import MESSAGE_MAX_BYTES, PackedAnswer, read_question, reply
from userspace_proxy.dns.responder import Responder
from userspace_proxy.dns.zone import Zone
from userspace_proxy.model.dns_names import DnsHost, HostGroup, NamedPort, ServiceNames
from userspace_proxy.model.names import NamespacedName

HTTP, METRICS, QUIC = NamedPort("http", "TCP", 80), NamedPort("metrics", "TCP", 9090), NamedPort("quic", "UDP", 443)
WEB = ServiceNames(("10.96.0.11", "fd00::11"), (HTTP, QUIC))
DB = ServiceNames(
    groups=(HostGroup((HTTP, METRICS), (DnsHost("db-0", "10.244.0.1"), DnsHost("10-244-0-2", "10.244.0.2"))),)
)
SERVICES = {
    "web": WEB,
    "db": DB,
    "empty": ServiceNames(),
    "outside": ServiceNames(external_name="www.example.com"),
    "inside": ServiceNames(external_name="web.default.svc.cluster.local"),
    "loop": ServiceNames(external_name="loop.default.svc.cluster.local"),
}
DOMAIN = ".default.svc.cluster.local."


def responder(services: dict[str, ServiceNames] | None = None) -> Responder:
    made = Responder(Zone("cluster.local", ["10.96.0.10"]))
    known = SERVICES if services is None else services
    for name, names in known.items():
        made.update(NamespacedName("default", name), names)
    made.is_synced = True
    return made


def ask(of: Responder, name: str, kind: str = "A", limit_bytes: int = MESSAGE_MAX_BYTES) -> dns.message.Message:
    """Return the answer to a query, which is checked as a client does."""
    query = dns.message.make_query(name, kind)
    question = read_question(query.to_wire())
    assert question is not None
    answer = of.answer(question) or PackedAnswer(dns.rcode.REFUSED)
    message = dns.message.from_wire(reply(question, answer, limit_bytes))
    assert query.is_response(message)
    return message


def records(message: dns.message.Message) -> list[str]:
    return sorted(f"{rrset.name} {rrset.ttl} {record}" for rrset in message.answer for record in rrset)


def values(message: dns.message.Message) -> list[str]:
    return sorted(str(record) for rrset in message.answer for record in rrset)
