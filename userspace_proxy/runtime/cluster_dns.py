"""Make cluster DNS, and prepare this node for it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence

from userspace_proxy.config.settings import Settings
from userspace_proxy.dns.sink import ClusterDns, end_processes
from userspace_proxy.dns.sockets import open_sockets
from userspace_proxy.dns.wire import DnsSettings
from userspace_proxy.errors import StartError, SyncError
from userspace_proxy.host import network
from userspace_proxy.modes.plans import NodeRules


async def make_dns(
    settings: Settings, rules: NodeRules, inherited: Sequence[socket.socket], stack: contextlib.AsyncExitStack
) -> ClusterDns | None:
    """Return cluster DNS, which serves at its addresses from now on, or None without ``--dns``.

    *inherited*: what `ClusterDns.inheritance` of the predecessor returned.

    Raises:
        StartError: it cannot serve there.
    """
    channels = [sock for sock in inherited if sock.family == socket.AF_UNIX]
    sockets = [sock for sock in inherited if sock.family != socket.AF_UNIX]
    addresses = settings.dns_addresses
    if not addresses:
        end_processes(channels)
        for sock in sockets:
            sock.close()
        if settings.dns:
            raise StartError("--dns: the range of cluster IPs is not known; give an address, as in --dns 10.96.0.10")
        return None
    sockets = open_sockets(addresses, sockets)
    try:
        for ip in addresses:
            await network.add_own_address(ip)
    except SyncError as error:
        raise StartError(f"--dns: {error}") from None
    wanted = DnsSettings(
        domain=settings.cluster_domain,
        addresses=addresses,
        upstream=settings.dns_upstream or None,
        orphan_timeout_s=settings.orphan_timeout_s,
        loop=settings.loop,
        log_format=settings.log_format,
        verbose=settings.verbose,
    )
    dns = ClusterDns(wanted, sockets, channels, rules.pods)
    dns.start()
    stack.push_async_callback(dns.close)
    return dns


async def remove_dns_addresses(dns: ClusterDns) -> None:
    """Remove the addresses of *dns* from this node, unless another process serves at them from now on."""
    if not dns.is_left:
        await network.remove_own_addresses()
