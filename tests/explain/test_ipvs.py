"""Virtual servers of ipvs, line by line."""

from __future__ import annotations

import pytest

from tests.modes.redirects_given import UDP, name
from userspace_proxy.model.service import ServicePort
from userspace_proxy.modes.ipvs.explain import explain, lines
from userspace_proxy.modes.reasons.known import Known

WEB = ServicePort(name("shop/web:http"), 80, ("10.96.0.1", "fd00:96::1"), node_port=30_080)
DNS = ServicePort(name("kube-system/dns", UDP), 53, ("10.96.0.10",))
KNOWN = Known((WEB, DNS))


@pytest.mark.parametrize(
    ("line", "explanation", "service"),
    [
        (
            "-A -t 10.96.0.1:80 -s rr",
            "A virtual server for the cluster IP 10.96.0.1:80 (TCP): each new connection goes to the next endpoint "
            "(rr: round robin).",
            "shop/web:http",
        ),
        (
            "-A -u 10.96.0.10:53 -s rr",
            "A virtual server for the cluster IP 10.96.0.10:53 (UDP): each new connection goes to the next endpoint "
            "(rr: round robin).",
            "kube-system/dns",
        ),
        (
            "-A -t [fd00:96::1]:80 -s rr -p 10800",
            "A virtual server for the cluster IP [fd00:96::1]:80 (TCP): each new connection goes to the next endpoint "
            "(rr: round robin). Affinity: a client meets the same endpoint again until it has been away for 10800 s "
            "(-p: persistent).",
            "shop/web:http",
        ),
        (
            "-a -t 10.96.0.1:80 -r 10.244.0.2:8080 -m -w 1",
            "10.244.0.2:8080 is an endpoint of the cluster IP 10.96.0.1:80 (TCP); the packet's destination becomes the "
            "endpoint's address and port (-m: masquerading, which is NAT); weight 1: its share "
            "beside the others', where the scheduler asks for weights.",
            "shop/web:http",
        ),
        (
            "-a -t 10.96.0.1:80 -r 10.244.0.3:8080 -m -w 0",
            "10.244.0.3:8080 is an endpoint of the cluster IP 10.96.0.1:80 (TCP); the packet's destination becomes the "
            "endpoint's address and port (-m: masquerading, which is NAT); weight 0: no new connections, open ones go "
            "on.",
            "shop/web:http",
        ),
        (
            "ip address add 10.96.0.1/32 dev kube-ipvs0",
            "10.96.0.1 becomes an address of this node, at the device kube-ipvs0, so that packets to it come to "
            "INPUT, where ipvs looks at them.",
            "shop/web:http",
        ),
        (
            "ip address add fd00:96::1/128 dev kube-ipvs0",
            "fd00:96::1 becomes an address of this node, at the device kube-ipvs0, so that packets to it come to "
            "INPUT, where ipvs looks at them.",
            "shop/web:http",
        ),
        (
            "address replace fd00:96::1/128 nodad dev kube-ipvs0",
            "fd00:96::1 becomes an address of this node, at the device kube-ipvs0, so that packets to it come to "
            "INPUT, where ipvs looks at them. Nobody else is asked for it (nodad).",
            "shop/web:http",
        ),
        (
            "-A -t 192.168.50.1:30080 -s sh -b flag-3",
            "A virtual server for the node port 192.168.50.1:30080 (TCP): a hash of the client's address chooses the "
            "endpoint (sh). flag-3 means nothing to the scheduler; it tells ours from others'.",
            "shop/web:http",
        ),
        (
            "ip link add kube-ipvs0 up group 10777 type dummy",
            "A device that leads nowhere: kube-ipvs0 only holds addresses of Services. kube-proxy makes one of this "
            "name, too; the group says that it is ours.",
            "",
        ),
    ],
)
def test_a_line_says_what_it_does_and_whose_it_is(line: str, explanation: str, service: str) -> None:
    assert explain(line, KNOWN) == (explanation, service)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "-A",
        "-A -f 5 -s rr",
        "-A -t 10.96.0.1:80",
        "-A -t 10.96.0.1:80 -s new",
        "-A -t 10.96.0.1:80 -s rr --more",
        "-a -t 10.96.0.1:80 -r 10.244.0.2:8080 -w 1",
        "-a -t 10.96.0.1:80 -m",
        "-a -t 10.96.0.1:80 -r 10.244.0.2:8080 -m -g",
        "-D -t 10.96.0.1:80",
        "ip address flush dev kube-ipvs0",
        "ip rule add fwmark 1 lookup 5",
    ],
)
def test_of_what_is_not_known_nothing_is_said(line: str) -> None:
    assert explain(line, KNOWN) == ("", "")


def test_a_text_is_explained_line_by_line_and_left_as_it_is() -> None:
    text = "-A -t 10.96.0.1:80 -s rr\n-a -t 10.96.0.1:80 -r 10.244.0.2:8080 -m -w 1\n"

    found = list(lines(text, KNOWN))

    assert [line.text for line in found] == text.splitlines()
    assert all(line.explanation for line in found)


def test_the_table_beside_virtual_servers_is_explained_as_one_of_nftables() -> None:
    table = """\
table inet userspace_proxy_ipvs {
	set cluster_ips4 {
		type ipv4_addr
		elements = {
			10.96.0.1 }
	}
	chain services4 {
		ip daddr @cluster_ips4 goto refuse
	}
}
"""
    text = f"ip link add kube-ipvs0 up group 10777 type dummy\n{table}-A -t 10.96.0.1:80 -s rr\n"

    found = list(lines(text, KNOWN))

    assert [line.text for line in found] == text.splitlines()
    assert {line.text.strip() for line in found if not line.explanation} == {"elements = {", "}"}
