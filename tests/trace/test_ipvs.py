"""/proc/net/ip_vs, as kernels print it."""

from __future__ import annotations

from userspace_proxy.trace.analysis import Recording, ipvs_server
from userspace_proxy.trace.values import IpvsServer

LISTING = """\
IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
TCP  0A60000B:0050 rr
  -> 0AF40003:1F90      Masq    1      0          1
  -> 0AF40002:1F90      Masq    0      2          0
UDP  0A60000A:0035 rr persistent 10800
  -> 0AF40004:14E9      Masq    1      0          0
TCP  [fd00:0096:0000:0000:0000:0000:0000:0001]:0050 sh
  -> [fd00:0244:0000:0000:0000:0000:0000:0002]:1F90      Masq    100    0          0
FWM  00000001 wlc
"""


def server(protocol: str, ip: str, port: int) -> IpvsServer | None:
    return ipvs_server(Recording(ip, port, protocol, [], "", {}, {}, ip_vs=LISTING))


def test_a_portal_has_its_scheduler_and_the_weights_of_its_real_servers() -> None:
    weights = {"10.244.0.3:8080": 1, "10.244.0.2:8080": 0}

    assert server("tcp", "10.96.0.11", 80) == IpvsServer("TCP 10.96.0.11:80", "rr", weights)


def test_protocols_families_and_ports_are_distinguished() -> None:
    assert server("udp", "10.96.0.11", 80) is None
    assert server("tcp", "10.96.0.11", 81) is None
    assert server("tcp", "fd00:96::1", 80) == IpvsServer("TCP [fd00:96::1]:80", "sh", {"[fd00:244::2]:8080": 100})
    assert server("udp", "10.96.0.10", 53) == IpvsServer("UDP 10.96.0.10:53", "rr", {"10.244.0.4:5353": 1})
