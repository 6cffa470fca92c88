"""Make cluster DNS, and prepare this node for it."""

from __future__ import annotations

import contextlib

from userspace_proxy.config.settings import Settings
from userspace_proxy.dns.sink import ClusterDns
from userspace_proxy.dns.sockets import open_sockets
from userspace_proxy.dns.wire import DnsSettings
from userspace_proxy.errors import StartError, SyncError
from userspace_proxy.host import network


async def make_dns(settings: Settings, stack: contextlib.AsyncExitStack) -> ClusterDns | None:
    """Return cluster DNS, serving at its addresses, or None if it is not asked for.

    Raises:
        StartError: it cannot serve there.
    """
    if not settings.dns:
        return None
    addresses = settings.dns_addresses
    if not addresses:
        raise StartError("--dns: the range of cluster IPs is not known; give an address, as in --dns 10.96.0.10")
    sockets = open_sockets(addresses)
    try:
        for ip in addresses:
            await network.add_own_address(ip)
    except SyncError as error:
        raise StartError(f"--dns: {error}") from None
    dns = ClusterDns(
        DnsSettings(
            domain=settings.cluster_domain,
            addresses=addresses,
            loop=settings.loop,
            log_format=settings.log_format,
            verbose=settings.verbose,
        ),
        sockets,
    )
    dns.start()
    stack.push_async_callback(dns.close)
    return dns
