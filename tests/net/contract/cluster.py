"""The world of the contract: two nodes with pods, a router between them, and clients outside.

    outside 192.0.2.9 - router - node-1 192.168.50.1, 192.168.60.1 - caller, local1 ... local4   10.244.0.11 ...
                             \\ - node-2 192.168.70.1               - remote1, remote2            10.244.1.11 ...

The proxy runs on node-1 (zone-a). Pods have an address of their own alone and a gateway, as with the CNI plugin `ptp`:
what a pod says to another pod of its node passes the node, so that the kernel's NAT and ours see the same. All of it
stands in IPv6 too (fd00:...). The router sends virtual addresses to node-1 and loses what comes back from there.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

from userspace_proxy.lab import Host, Lab

NODE, REMOTE_NODE = "node-1", "node-2"
PRIMARY = {4: "192.168.50.1", 6: "fd00:50::1"}
ALTERNATE = {4: "192.168.60.1", 6: "fd00:60::1"}
LOCALHOST = {4: "127.0.0.1", 6: "::1"}
OUTSIDE = {4: "192.0.2.9", 6: "fd00:2::9"}
GATEWAY = {4: "10.244.0.1", 6: "fd00:244::1"}
# A load balancer that is not the node: it stands beside the router.
BALANCER = {4: "203.0.127.250", 6: "fd00:203::f:250"}
CLUSTER_CIDRS = "10.244.0.0/16,fd00:244::/48"
SERVICE_CIDRS = "10.96.0.0/16,fd00:96::/108"

WEB, DNS = 8080, 5353  # what Services lead to
OTHER_WEB, OTHER_DNS = 8081, 5354  # the same, answered by NAME-2
PROXIED_WEB = 8082  # wants a PROXY header and believes it
ECHO = 7000

_LOCAL_PODS = ("caller", "local1", "local2", "local3", "local4")
_REMOTE_PODS = ("remote1", "remote2")
# What can be asked, or ask: name -> addresses by family.
ADDRESSES: dict[str, dict[int, str]] = {
    NODE: PRIMARY,
    "outside": OUTSIDE,
    "balancer": BALANCER,
    **{name: {4: f"10.244.0.{n}", 6: f"fd00:244::{n}"} for n, name in enumerate(_LOCAL_PODS, 11)},
    **{name: {4: f"10.244.1.{n}", 6: f"fd00:244:0:1::{n}"} for n, name in enumerate(_REMOTE_PODS, 11)},
}
NODE_OF = {NODE: NODE, **dict.fromkeys(_LOCAL_PODS, NODE), **dict.fromkeys(_REMOTE_PODS, REMOTE_NODE)}


@dataclass(frozen=True)
class Place:
    """Where a client or a backend lives."""

    name: str
    host: Host

    @property
    def ips(self) -> dict[int, str]:
        """Its own addresses, by family."""
        return ADDRESSES[self.name]


@dataclass(frozen=True)
class Cluster:
    """All places by name."""

    lab: Lab
    node: Host
    places: dict[str, Place]
    node_ips: frozenset[str]


def build_cluster(lab: Lab) -> Cluster:
    """Lay cables, give addresses and routes. No server runs yet."""
    router, node, remote, outside = (lab.add(name) for name in ("router", NODE, REMOTE_NODE, "outside"))
    for host in (node, remote, outside):
        lab.link(host, "eth0", router, host.name)
    for host in (router, node, remote):
        host.set_knob("ipv4/ip_forward", 1)
        host.set_knob("ipv6/conf/all/forwarding", 1)
        for device in ("all", "default", *(("eth0",) if host is not router else (NODE, REMOTE_NODE, "outside"))):
            host.set_knob(f"ipv4/conf/{device}/send_redirects", 0)
    _configure(
        router,
        *_addresses(NODE, "192.168.50.254/24", "fd00:50::fe/64"),
        *_addresses(REMOTE_NODE, "192.168.70.254/24", "fd00:70::fe/64"),
        *_addresses("outside", "192.0.2.254/24", "fd00:2::fe/64"),
        *_addresses("lo", f"{BALANCER[4]}/32", f"{BALANCER[6]}/128"),
        *(f"route add {to} via 192.168.50.1" for to in ("10.96.0.0/15", "10.244.0.0/24", "192.168.60.1/32")),
        *(f"route add {to} via 192.168.50.1" for to in ("203.0.112.0/20", "198.51.96.0/20")),
        *(f"route add {to} via fd00:50::1" for to in ("fd00:96::/64", "fd00:244::/64", "fd00:60::1/128")),
        *(f"route add {to} via fd00:50::1" for to in ("fd00:203::/64", "fd00:198::/64")),
        "route add 10.244.1.0/24 via 192.168.70.1",
        "route add fd00:244:0:1::/64 via fd00:70::1",
    )
    back = f'iifname "{NODE}" oifname "{NODE}" drop'
    router.run("nft", f"table inet router {{ chain back {{ type filter hook forward priority 0; {back}; }}; }}")
    _configure(
        node,
        *_addresses("eth0", "192.168.50.1/24", "fd00:50::1/64"),
        *_addresses("eth0", f"{ALTERNATE[4]}/32", f"{ALTERNATE[6]}/128"),
        "route add 0.0.0.0/0 via 192.168.50.254",
        "route add ::/0 via fd00:50::fe",
    )
    _configure(
        remote,
        *_addresses("eth0", "192.168.70.1/24", "fd00:70::1/64"),
        "route add 0.0.0.0/0 via 192.168.70.254",
        "route add ::/0 via fd00:70::fe",
    )
    _configure(
        outside,
        *_addresses("eth0", f"{OUTSIDE[4]}/24", f"{OUTSIDE[6]}/64"),
        "route add 0.0.0.0/0 via 192.0.2.254",
        "route add ::/0 via fd00:2::fe",
    )
    hosts = {NODE: node, "outside": outside, "balancer": router}
    hosts |= _pods(lab, node, _LOCAL_PODS, GATEWAY)
    hosts |= _pods(lab, remote, _REMOTE_PODS, {4: "10.244.1.1", 6: "fd00:244:0:1::1"})
    node_ips = frozenset({*PRIMARY.values(), *ALTERNATE.values(), *LOCALHOST.values(), *GATEWAY.values()})
    return Cluster(lab, node, {name: Place(name, host) for name, host in hosts.items()}, node_ips)


def _pods(lab: Lab, node: Host, names: tuple[str, ...], gateway: dict[int, str]) -> dict[str, Host]:
    made, on_node = {}, []
    for name in names:
        pod = made[name] = lab.add(name)
        lab.link(pod, "eth0", node, f"v-{name}")
        ips = ADDRESSES[name]
        _configure(
            pod,
            *_addresses("eth0", f"{ips[4]}/32", f"{ips[6]}/128"),
            f"route add {gateway[4]}/32 dev eth0",
            f"route add {gateway[6]}/128 dev eth0",
            f"route add 0.0.0.0/0 via {gateway[4]}",
            f"route add ::/0 via {gateway[6]}",
        )
        on_node += _addresses(f"v-{name}", f"{gateway[4]}/32", f"{gateway[6]}/128")
        on_node += [f"route add {ips[4]}/32 dev v-{name}", f"route add {ips[6]}/128 dev v-{name}"]
    _configure(node, *on_node)
    return made


def _addresses(device: str, ip4: str, ip6: str) -> list[str]:
    return [f"address add {ip4} dev {device}", f"address add {ip6} dev {device} nodad"]


def _configure(host: Host, *lines: str) -> None:
    host.run("ip", "-batch", "-", stdin="\n".join(lines))


# ---- backends


class Backends(threading.Thread):
    """Servers in every pod, on the node and at the balancer: each answers with its name and the client that it sees."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(daemon=True)
        self._selector = selectors.DefaultSelector()
        self._waker, waked = socket.socketpair()
        self._selector.register(waked, selectors.EVENT_READ, None)
        self._sockets = [self._waker, waked]
        for place in cluster.places.values():
            if place.name not in ("outside", "caller"):
                self._serve(place)

    def _serve(self, place: Place) -> None:
        name = place.name
        self._listen(place, WEB, lambda sock, peer: _answer(sock, name, peer))
        self._listen(place, OTHER_WEB, lambda sock, peer: _answer(sock, f"{name}-2", peer))
        self._listen(place, PROXIED_WEB, lambda sock, _: _in_thread(_answer_header, sock, name))
        self._listen(place, ECHO, lambda sock, _: _in_thread(_echo, sock, name))
        self._answer_datagrams(place, DNS, name)
        self._answer_datagrams(place, OTHER_DNS, f"{name}-2")
        if name == "balancer":
            self._listen(place, 80, lambda sock, peer: _answer(sock, name, peer))
            self._answer_datagrams(place, 80, name)

    def _listen(self, place: Place, port: int, accepted: Callable[[socket.socket, str], None]) -> None:
        with place.host.inside():
            sock = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512)
        sock.setblocking(False)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, (peer, *_) = sock.accept()
                    accepted(connection, _plain(peer))

        self._when_readable(sock, accept)

    def _answer_datagrams(self, place: Place, port: int, name: str) -> None:
        """Answer datagrams from the address that was dialled; a wildcard socket would choose another one."""
        for ip in [*place.ips.values(), *(() if place.name != NODE else ALTERNATE.values())]:
            with place.host.inside():
                sock = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_DGRAM)
                sock.bind((ip, port))
            sock.setblocking(False)

            def answer(sock: socket.socket = sock) -> None:
                with contextlib.suppress(OSError):
                    while True:
                        question, peer = sock.recvfrom(65_536)
                        sock.sendto(f"{name} {_plain(peer[0])} ".encode() + question, peer)

            self._when_readable(sock, answer)

    def _when_readable(self, sock: socket.socket, act: Callable[[], None]) -> None:
        self._sockets.append(sock)
        self._selector.register(sock, selectors.EVENT_READ, act)

    def run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    return
                key.data()

    def close(self) -> None:
        self._waker.send(b"x")
        self.join(5)
        for sock in self._sockets:
            sock.close()
        self._selector.close()


def _in_thread(serve: Callable[[socket.socket, str], None], sock: socket.socket, name: str) -> None:
    threading.Thread(target=serve, args=(sock, name), daemon=True).start()


def _answer(sock: socket.socket, name: str, peer: str) -> None:
    with contextlib.suppress(OSError), sock:
        sock.sendall(f"{name} {peer}".encode())


def _answer_header(sock: socket.socket, name: str) -> None:
    """Read a PROXY header, version 1 or 2, and answer with the client that it names."""
    sock.settimeout(1.0)
    peer = "no-header"
    with contextlib.suppress(OSError):
        data = sock.recv(1024)
        if data.startswith(b"PROXY "):
            peer = data.split()[2].decode()
        elif data.startswith(b"\r\n\r\n\x00\r\nQUIT\n"):
            size, family = (4, socket.AF_INET) if data[13] >> 4 == 1 else (16, socket.AF_INET6)
            peer = socket.inet_ntop(family, data[16 : 16 + size])
    _answer(sock, name, peer)


def _echo(sock: socket.socket, name: str) -> None:
    with contextlib.suppress(OSError), sock:
        while data := sock.recv(1024):
            sock.sendall(name.encode() + b" " + data)


def _plain(ip: str) -> str:
    return ip.removeprefix("::ffff:")
