"""Recordings are interpreted: hooks, chains, rules, translations, and the outcome."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.trace.recordings import MODES, hook, leg, recording, trace, visit
from userspace_proxy.trace.analysis import analyse, elements_in, flow_of
from userspace_proxy.trace.nftrace import messages
from userspace_proxy.trace.values import Ends, PacketRole, Visit

FORWARDED = ["PREROUTING", "FORWARD", "POSTROUTING"]
SENT = ["OUTPUT", "POSTROUTING"]


def rules_of(one: Visit) -> list[str]:
    return [step.rule for step in one.steps]


def test_in_userspace_mode_a_packet_comes_to_the_proxy_which_dials_and_answers() -> None:
    told = trace("userspace")

    assert [(one.role, one.what, [at.name for at in one.hooks]) for one in told.legs] == [
        (PacketRole.CLIENT, "SYN", ["PREROUTING", "INPUT"]),
        (PacketRole.DIAL, "SYN", SENT),
        (PacketRole.ANSWER, "SYN+ACK", SENT),
    ]
    assert told.listener is not None
    assert told.listener.name == "userspace-proxy worker"
    client, dial = told.legs[:2]
    assert client.last.receiver == f"192.168.50.1:{told.listener.port}"
    assert told.outcome == (
        f"10.96.0.11:80 became {client.last.receiver}, the proxy, which dialled {dial.last.receiver}; "
        "the answer was SYN+ACK"
    )


def test_the_deciding_rule_has_its_map_element_and_the_skipped_rules() -> None:
    decided = visit(hook(leg("userspace", PacketRole.CLIENT), "PREROUTING"), "inet userspace_proxy prerouting")

    last = decided.steps[-1]

    assert (last.chain, last.verdict, last.depth, last.skipped) == ("services4", "accept", 2, 1)
    assert last.rule.endswith("redirect to :ip daddr . meta l4proto . th dport map @service_ips4")
    assert last.element == '10.96.0.11 . tcp . 80 comment "default/my-service" : 12162'
    assert decided.before.receiver == "10.96.0.11:80"
    assert decided.after is not None
    assert decided.after.receiver == "192.168.50.1:12162"


def test_rules_of_iptables_have_the_text_of_iptables_save() -> None:
    for mode, chain, words in (
        ("userspace-iptables", "USERSPACE-PROXY", '--comment "default/my-service" -j REDIRECT --to-ports 12162'),
        (
            "iptables",
            "KUBE-SERVICES",
            '-m comment --comment "default/my-service cluster IP" -m tcp --dport 80 -j KUBE-',
        ),
    ):
        steps = visit(hook(leg(mode, PacketRole.CLIENT), "PREROUTING"), "ip nat PREROUTING").steps
        (named,) = [step.rule for step in steps if words in step.rule]
        assert named.startswith(f"-A {chain} -d 10.96.0.11/32 -p tcp ")


def test_kube_proxys_chains_lead_from_the_service_to_the_endpoint() -> None:
    client = leg("iptables", PacketRole.CLIENT)
    steps = visit(hook(client, "PREROUTING"), "ip nat PREROUTING").steps

    assert [step.chain[:9] for step in steps] == ["PREROUTIN", "KUBE-SERV", "KUBE-SVC-", "KUBE-SEP-"]
    assert [step.depth for step in steps] == [0, 1, 2, 3]
    assert steps[-1].rule.endswith(f"-j DNAT --to-destination {client.last.receiver}")
    assert steps[-1].skipped == 1  # the one for hairpins
    forward = visit(hook(client, "FORWARD"), "ip filter FORWARD")
    assert len(forward.steps) == 4
    assert sum(step.skipped for step in forward.steps) + forward.skipped == 3
    assert (forward.end, forward.by_policy) == ("accept", True)


@pytest.mark.parametrize("mode", ["nftables", "iptables"])
def test_kernel_modes_forward_the_packet_and_translate_its_answer(mode: str) -> None:
    told = trace(mode)
    client, answer = leg(mode, PacketRole.CLIENT), leg(mode, PacketRole.ANSWER)

    assert [one.name for one in client.hooks] == FORWARDED
    assert [one.name for one in answer.hooks] == FORWARDED
    assert told.leg(PacketRole.DIAL) is None
    assert told.listener is None
    pod = client.last.receiver
    assert told.outcome == f"10.96.0.11:80 became {pod}; the answer was SYN+ACK"
    assert (answer.first.sender, answer.last.sender) == (pod, "10.96.0.11:80")
    put_back = hook(answer, "POSTROUTING")
    assert put_back.before.sender == pod
    assert not put_back.visits  # no rule did it: conntrack remembers


def test_ipvs_takes_the_packet_between_input_and_output_and_no_rule_decides() -> None:
    told = trace("ipvs")
    client = leg("ipvs", PacketRole.CLIENT)

    assert [one.name for one in client.hooks] == ["PREROUTING", "INPUT", "OUTPUT", "POSTROUTING"]
    assert hook(client, "INPUT").after is None
    assert hook(client, "OUTPUT").before.receiver == client.last.receiver
    assert told.ipvs is not None
    assert told.ipvs.scheduler == "rr"
    assert client.last.receiver in told.ipvs.weights
    assert told.outcome == f"10.96.0.11:80 became {client.last.receiver}; the answer was SYN+ACK"


@pytest.mark.parametrize("mode", MODES)
def test_the_conntrack_entry_matches_the_packets(mode: str) -> None:
    told = trace(mode)

    assert told.flow is not None
    assert told.flow.original == leg(mode, PacketRole.CLIENT).first
    assert told.flow.reply == leg(mode, PacketRole.ANSWER).first


@pytest.mark.parametrize("mode", MODES)
def test_the_tracers_own_table_is_not_shown(mode: str) -> None:
    tables = {visit.table for one in trace(mode).legs for at in one.hooks for visit in at.visits}

    assert "userspace_proxy_trace" not in tables
    assert all("nftrace" not in step.rule for one in trace(mode).legs for at in one.hooks for visit in at.visits
               for step in visit.steps)  # fmt: skip


def test_a_packet_whose_number_changes_on_its_way_is_still_one_packet() -> None:
    told = [message for text in recording("nftables").datagrams for message in messages(bytes.fromhex(text))]
    answering = {message.packet for message in told if message.what == "SYN+ACK"}

    assert len(answering) > 1
    assert [one.name for one in leg("nftables", PacketRole.ANSWER).hooks] == FORWARDED


def test_a_lost_packet_is_reported_with_its_last_hook() -> None:
    whole = recording("nftables")

    def is_after_forwarding(text: str) -> bool:
        return any(message.chain in ("after_forward", "after_postrouting") or message.chain == "postrouting"
                   for message in messages(bytes.fromhex(text)))  # fmt: skip

    cut = replace(whole, datagrams=[text for text in whole.datagrams if not is_after_forwarding(text)])

    assert analyse(cut).outcome.startswith("no route: after PREROUTING this host found no route")


def test_without_trace_messages_no_packet_came() -> None:
    assert analyse(replace(recording("nftables"), datagrams=[])).outcome == "no packet came"
    silent = replace(recording("nftables"), datagrams=[], probe="no packet left: network is unreachable")
    assert analyse(silent).outcome == "no packet left: network is unreachable"


def test_incomplete_and_foreign_messages_are_skipped() -> None:
    (first, *_) = recording("nftables").datagrams

    assert list(messages(bytes.fromhex(first)[:10])) == []
    assert list(messages(b"\x14\0\0\0\x02\0" + bytes(14))) == []
    assert list(messages(bytes(64))) == []


def test_map_elements_are_looked_up_by_the_packet_before_the_rule() -> None:
    assert {element.key for element in elements_in(trace("userspace"))} == {
        "inet userspace_proxy service_ips4 10.96.0.11 . tcp . 80"
    }


def test_the_conntrack_entry_is_found_among_others() -> None:
    listing = (
        "tcp      6 431999 ESTABLISHED src=10.0.0.1 dst=10.0.0.2 sport=1 dport=2 src=10.0.0.2 dst=10.0.0.1 sport=2 "
        "dport=1 [ASSURED] mark=0 use=1\n"
        "udp      17 29 src=fd00::2 dst=fd00:96::1 sport=5 dport=53 [UNREPLIED] src=fd00::9 dst=fd00::2 sport=5353 "
        "dport=5 mark=0 use=1\nunknown  2 599 src=10.244.0.1 dst=224.0.0.22 [UNREPLIED]\n"
    )

    found = flow_of(listing, Ends("fd00::2", 5, "fd00:96::1", 53))

    assert found is not None
    assert str(found.reply) == "[fd00::9]:5353 -> [fd00::2]:5"
    assert flow_of(listing, Ends("10.0.0.1", 1, "10.0.0.2", 3)) is None
    first = flow_of(listing, Ends("10.0.0.1", 1, "10.0.0.2", 2))
    assert first is not None
    assert first.state == "ESTABLISHED"
