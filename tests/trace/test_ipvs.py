"""/proc/net/ip_vs, as kernels print it."""

from __future__ import annotations

from userspace_proxy.trace.ipvs import virtual_server, virtual_servers
from userspace_proxy.trace.values import RealServer, VirtualServer

TEXT = """\
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


def test_a_virtual_server_has_its_scheduler_and_its_real_servers() -> None:
    assert virtual_server(TEXT, "tcp", "10.96.0.11", 80) == VirtualServer(
        "tcp",
        "10.96.0.11",
        80,
        "rr",
        (RealServer("10.244.0.3", 8080, "Masq", 1), RealServer("10.244.0.2", 8080, "Masq", 0)),
    )


def test_protocols_families_and_ports_are_told_apart() -> None:
    assert virtual_server(TEXT, "udp", "10.96.0.11", 80) is None
    assert virtual_server(TEXT, "tcp", "10.96.0.11", 81) is None
    six = virtual_server(TEXT, "tcp", "fd00:96::1", 80)
    assert six is not None
    assert (six.scheduler, six.real_servers) == ("sh", (RealServer("fd00:244::2", 8080, "Masq", 100),))
    dns = virtual_server(TEXT, "udp", "10.96.0.10", 53)
    assert dns is not None
    assert dns.real_servers == (RealServer("10.244.0.4", 5353, "Masq", 1),)


def test_a_kernel_without_ipvs_has_none() -> None:
    assert virtual_servers("") == []
