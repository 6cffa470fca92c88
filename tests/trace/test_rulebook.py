"""Rules by their numbers: nft's own words, and those of iptables-save where iptables wrote them."""

from __future__ import annotations

from userspace_proxy.trace.rulebook import Rulebook

NFT = """\
table ip nat { # handle 1
	chain KUBE-SERVICES { # handle 4
		meta l4proto tcp ip daddr 10.96.0.11  tcp dport 80 counter packets 3 bytes 180 jump KUBE-SVC-A # handle 7
		 fib daddr type local counter packets 0 bytes 0 jump KUBE-NODEPORTS # handle 9
	}

	chain PREROUTING { # handle 2
		type nat hook prerouting priority dstnat; policy accept;
		 counter packets 3 bytes 180 jump KUBE-SERVICES # handle 3
	}
}
table inet mine { # handle 2
	set some {
		type ipv4_addr
	}

	chain input { # handle 1
		type filter hook input priority filter + 10; policy drop;
		tcp dport 22 accept comment "the one # handle 5" # handle 8
	}
}
"""  # noqa: E101 - as nft prints it
SAVED = """\
*nat
:PREROUTING ACCEPT [0:0]
:KUBE-SERVICES - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A KUBE-SERVICES -d 10.96.0.11/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-A
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
COMMIT
"""


def test_a_base_chain_has_a_hook_a_type_and_a_priority() -> None:
    chain = Rulebook(NFT, {}).chain("inet", "mine", "input")

    assert (chain.hook, chain.kind, chain.priority) == ("input", "filter", "filter + 10")
    assert dict(chain.rules) == {8: 'tcp dport 22 accept comment "the one # handle 5"'}


def test_rules_of_iptables_are_taken_from_iptables_save() -> None:
    chain = Rulebook(NFT, {"ip": SAVED}).chain("ip", "nat", "KUBE-SERVICES")

    assert dict(chain.rules) == {
        7: "-A KUBE-SERVICES -d 10.96.0.11/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-A",
        9: "-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS",
    }


def test_iptables_save_is_ignored_if_the_number_of_rules_differs() -> None:
    one_less = SAVED.replace("-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS\n", "")

    chain = Rulebook(NFT, {"ip": one_less, "inet": SAVED}).chain("ip", "nat", "KUBE-SERVICES")

    assert list(chain.rules.values()) == [
        "meta l4proto tcp ip daddr 10.96.0.11 tcp dport 80 jump KUBE-SVC-A",
        "fib daddr type local jump KUBE-NODEPORTS",
    ]


def test_an_unknown_chain_is_empty() -> None:
    assert dict(Rulebook(NFT, {}).chain("ip", "nat", "GONE").rules) == {}
