"""Every record of the Kubernetes DNS specification 1.1.0, read by another library than the one that wrote it."""

from __future__ import annotations

import dns.flags
import dns.rcode
import pytest

from tests.dns.questions import DB, DOMAIN, HTTP, SERVICES, ask, records, responder, values
from userspace_proxy.dns.responder import Alias
from userspace_proxy.model.dns_names import DnsHost, HostGroup, ServiceNames
from userspace_proxy.model.names import NamespacedName


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("dns-version.cluster.local.", "TXT", ['"1.1.0"']),
        (f"web{DOMAIN}", "A", ["10.96.0.11"]),
        (f"web{DOMAIN}", "AAAA", ["fd00::11"]),
        (f"_http._tcp.web{DOMAIN}", "SRV", [f"0 100 80 web{DOMAIN}"]),
        (f"_quic._udp.web{DOMAIN}", "SRV", [f"0 100 443 web{DOMAIN}"]),
        ("11.0.96.10.in-addr.arpa.", "PTR", [f"web{DOMAIN}"]),
        (f"{'1.1' + '.0' * 26}.0.0.d.f.ip6.arpa.", "PTR", [f"web{DOMAIN}"]),
        (f"db{DOMAIN}", "A", ["10.244.0.1", "10.244.0.2"]),
        (f"db-0.db{DOMAIN}", "A", ["10.244.0.1"]),
        (f"10-244-0-2.db{DOMAIN}", "A", ["10.244.0.2"]),
        (f"_http._tcp.db{DOMAIN}", "SRV", [f"0 100 80 10-244-0-2.db{DOMAIN}", f"0 100 80 db-0.db{DOMAIN}"]),
        (f"_metrics._tcp.db{DOMAIN}", "SRV", [f"0 100 9090 10-244-0-2.db{DOMAIN}", f"0 100 9090 db-0.db{DOMAIN}"]),
        ("1.0.244.10.in-addr.arpa.", "PTR", [f"db-0.db{DOMAIN}"]),
        ("2.0.244.10.in-addr.arpa.", "PTR", [f"10-244-0-2.db{DOMAIN}"]),
        (f"outside{DOMAIN}", "CNAME", ["www.example.com."]),
        (f"inside{DOMAIN}", "A", ["10.96.0.11", f"web{DOMAIN}"]),
        ("172-17-0-3.default.pod.cluster.local.", "A", ["172.17.0.3"]),
        ("fd00--3.default.pod.cluster.local.", "AAAA", ["fd00::3"]),
        ("cluster.local.", "NS", ["ns.dns.cluster.local."]),
        ("ns.dns.cluster.local.", "A", ["10.96.0.10"]),
    ],
)
def test_each_record_is_there_for_five_seconds(name: str, kind: str, expected: list[str]) -> None:
    answer = ask(responder(), name, kind)

    assert answer.rcode() == dns.rcode.NOERROR
    assert values(answer) == expected
    assert {rrset.ttl for rrset in answer.answer} == {5}
    assert answer.flags & dns.flags.AA


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (f"db{DOMAIN}", "AAAA"),
        (f"web{DOMAIN}", "TXT"),
        (f"_tcp.web{DOMAIN}", "SRV"),
        (f"_http._tcp.web{DOMAIN}", "A"),
        ("default.svc.cluster.local.", "A"),
        ("svc.cluster.local.", "A"),
        ("cluster.local.", "A"),
        ("172-17-0-3.default.pod.cluster.local.", "AAAA"),
        ("11.0.96.10.in-addr.arpa.", "A"),
    ],
)
def test_a_name_without_records_of_that_type_has_no_data(name: str, kind: str) -> None:
    answer = ask(responder(), name, kind)

    assert (answer.rcode(), answer.answer) == (dns.rcode.NOERROR, [])
    assert [str(rrset.name) for rrset in answer.authority] == ["cluster.local."], "the SOA"


@pytest.mark.parametrize(
    "name",
    [
        f"missing{DOMAIN}",
        f"empty{DOMAIN}",
        f"_dns._tcp.web{DOMAIN}",
        f"_http._udp.web{DOMAIN}",
        f"pod.web{DOMAIN}",
        f"a.b.c.web{DOMAIN}",
        "web.other.svc.cluster.local.",
        "other.svc.cluster.local.",
        "no-address.default.pod.cluster.local.",
        "fe80--1%eth0.default.pod.cluster.local.",
        "any.cluster.local.",
    ],
)
def test_a_name_that_is_not_there_does_not_exist(name: str) -> None:
    answer = ask(responder(), name)

    assert (answer.rcode(), answer.answer) == (dns.rcode.NXDOMAIN, [])
    assert [str(rrset.name) for rrset in answer.authority] == ["cluster.local."], "the SOA"


def test_a_name_is_answered_as_it_was_written() -> None:
    assert records(ask(responder(), "wEb.DEFAULT.svc.Cluster.LOCAL.")) == [
        "wEb.DEFAULT.svc.Cluster.LOCAL. 5 10.96.0.11"
    ]


def test_srv_records_come_with_the_addresses_of_their_targets() -> None:
    answer = ask(responder(), f"_http._tcp.db{DOMAIN}", "SRV")

    assert {str(rrset.name): str(rrset[0]) for rrset in answer.additional} == {
        f"db-0.db{DOMAIN}": "10.244.0.1",
        f"10-244-0-2.db{DOMAIN}": "10.244.0.2",
    }


def test_the_target_of_an_external_name_outside_is_to_be_asked_elsewhere() -> None:
    with pytest.raises(Alias, match=r"www\.example\.com"):
        ask(responder(), f"outside{DOMAIN}")


def test_a_loop_of_external_names_ends_here() -> None:
    assert ask(responder(), f"loop{DOMAIN}").rcode() == dns.rcode.SERVFAIL


def test_an_endpoint_with_an_invalid_hostname_spoils_no_other_one() -> None:
    hosts = (DnsHost("x" * 64, "10.244.1.1"), DnsHost("ok", "10.244.1.2"), DnsHost("a..b", "10.244.1.3"))
    of = responder({"odd": ServiceNames(groups=(HostGroup((HTTP,), hosts),))})

    assert values(ask(of, f"odd{DOMAIN}")) == ["10.244.1.1", "10.244.1.2", "10.244.1.3"]
    assert values(ask(of, f"_http._tcp.odd{DOMAIN}", "SRV")) == [f"0 100 80 ok.odd{DOMAIN}"]
    assert values(ask(of, f"ok.odd{DOMAIN}")) == ["10.244.1.2"]


def test_names_outside_are_not_answered() -> None:
    assert ask(responder(), "www.example.com.").rcode() == dns.rcode.REFUSED


def test_before_all_services_are_known_a_missing_name_may_exist() -> None:
    of = responder()
    of.is_synced = False

    assert ask(of, f"missing{DOMAIN}").rcode() == dns.rcode.SERVFAIL
    assert values(ask(of, f"web{DOMAIN}")) == ["10.96.0.11"]


def test_a_change_shows_in_the_next_answer() -> None:
    of = responder()
    names = (f"web{DOMAIN}", f"new{DOMAIN}", f"inside{DOMAIN}", "1.0.244.10.in-addr.arpa.")
    before = [ask(of, name, "PTR" if "arpa" in name else "A").rcode() for name in names]
    of.update(NamespacedName("default", "web"), ServiceNames(("10.96.0.99",)))
    of.update(NamespacedName("default", "new"), ServiceNames(("10.96.0.98",)))
    of.update(NamespacedName("default", "db"), None)

    assert before == [dns.rcode.NOERROR, dns.rcode.NXDOMAIN, dns.rcode.NOERROR, dns.rcode.NOERROR]
    assert values(ask(of, names[0])) == ["10.96.0.99"]
    assert values(ask(of, names[1])) == ["10.96.0.98"]
    assert values(ask(of, names[2])) == ["10.96.0.99", f"web{DOMAIN}"]
    assert ask(of, names[3], "PTR").rcode() == dns.rcode.REFUSED
    assert ask(of, f"db{DOMAIN}").rcode() == dns.rcode.NXDOMAIN


def test_the_second_answer_is_a_kept_one() -> None:
    of = responder()

    assert records(ask(of, f"db{DOMAIN}")) == records(ask(of, f"db{DOMAIN}"))
    assert (of.hits, of.misses) == (1, 1)


def many(count: int) -> ServiceNames:
    hosts = tuple(DnsHost(f"h{i}", f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}") for i in range(count))
    return ServiceNames(groups=(HostGroup((HTTP,), hosts),))


def test_four_thousand_endpoints_fit_into_one_message() -> None:
    of = responder({"many": many(4_000)})

    assert len(values(ask(of, f"many{DOMAIN}"))) == 4_000
    assert of.cut == 0


def test_of_more_endpoints_as_many_as_fit_take_turns() -> None:
    of = responder({"many": many(4_500)})

    answers = [values(ask(of, f"many{DOMAIN}")) for _ in range(5)]

    assert {len(answer) for answer in answers} == {4_078}
    assert len({ip for answer in answers for ip in answer}) == 4_500
    assert of.cut == 5


def test_a_truncated_answer_for_any_number_of_endpoints_has_as_many_as_fit() -> None:
    answer = ask(responder({"many": many(4_500)}), f"many{DOMAIN}", limit_bytes=512)

    assert answer.flags & dns.flags.TC
    assert len(answer.answer[0]) > 25


@pytest.mark.parametrize("edns", [False, True])
def test_an_answer_that_is_too_long_is_truncated(edns: bool) -> None:
    limit_bytes = 1_232 if edns else 512
    of = responder({"db": many(200)})

    answer, services = ask(of, f"db{DOMAIN}", limit_bytes=limit_bytes), ask(of, f"db{DOMAIN}", "ANY", limit_bytes)

    assert answer.flags & dns.flags.TC
    assert services.flags & dns.flags.TC
    assert services.answer == []
    (addresses,) = answer.answer
    assert len(addresses) > 25, "clients without TCP, such as musl's before 1.2.4, use these"
    assert limit_bytes - 16 < len(answer.to_wire(max_size=65_535)) <= limit_bytes


def test_each_address_of_a_headless_service_is_the_first_one_in_turn() -> None:
    of = responder({"db": many(3)})

    def first() -> str:
        (addresses,) = ask(of, f"db{DOMAIN}").answer
        assert len(addresses) == 3
        return str(addresses[0])

    assert [first() for _ in range(6)] == ["10.0.0.0", "10.0.0.1", "10.0.0.2"] * 2


def test_the_turns_are_those_of_one_question_whatever_else_is_asked() -> None:
    """C libraries ask for A and AAAA in turn."""
    of = responder({"db": many(2)})

    found = []
    for _ in range(4):
        found.append(str(ask(of, f"db{DOMAIN}").answer[0][0]))
        ask(of, f"db{DOMAIN}", "AAAA")

    assert found == ["10.0.0.0", "10.0.0.1"] * 2


def test_the_services_of_the_specification_have_no_mistakes() -> None:
    assert DB in SERVICES.values()
