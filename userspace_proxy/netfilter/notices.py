"""Kernel notices that another program changed rules (nfnetlink multicast group 7) or the network (rtnetlink).

Notices are sent for nftables, and for iptables on nf_tables. Loads by this process cause thousands of them. So it
leaves the group while it loads (`RuleWatch.quiet`), and a check follows afterwards.
"""

import asyncio
import contextlib
import logging
import struct
from collections.abc import Callable, Collection, Iterator

from userspace_proxy import netlink
from userspace_proxy.netfilter.nfnetlink import ATTR_TABLE, NFTABLES

# Interfaces; addresses and routes of IPv4, then of IPv6 (RTMGRP_... in linux/rtnetlink.h).
_GROUPS_NETWORK = 0x1 | 0x10 | 0x40 | 0x100 | 0x400
_GROUPS_RULES = 0x80 | 0x40000
_SOL_NETLINK = 270
_ADD_MEMBERSHIP, _DROP_MEMBERSHIP = 1, 2
_GROUP_NFTABLES = 7
_NEWGEN = NFTABLES | 15

log = logging.getLogger(__name__)


class _Notices:
    """A netlink socket read by the event loop."""

    def __init__(self, protocol: int, groups: int, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._sock = netlink.open_socket(protocol, 0)  # non-blocking
        self._sock.bind((0, groups))
        self._loop.add_reader(self._sock.fileno(), self._read)

    def close(self) -> None:
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()

    def _read(self) -> None:
        noted = False
        while True:
            try:
                datagram = self._sock.recv(netlink.RECEIVED_BYTES)
            except BlockingIOError:
                break
            except OSError as error:  # ENOBUFS: notices were lost, so assume a change
                log.debug("notices were lost: %s", error)
                noted = True
                continue
            noted = noted or self.concerns_us(datagram)
        if noted:
            self._on_change()

    def concerns_us(self, datagram: bytes) -> bool:
        """Return whether *datagram* requires a call of ``on_change``. Subclasses filter."""
        return bool(datagram)


class RuleNotices(_Notices):
    """Calls *on_change* when another program changes one of *tables*."""

    def __init__(self, tables: Collection[str], on_change: Callable[[], None]) -> None:
        self._tables = {name.encode() for name in tables}
        self._pauses = 0
        super().__init__(netlink.NETFILTER, 0, on_change)
        self._sock.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _GROUP_NFTABLES)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore notices while this process loads rules; may be nested."""
        if not self._pauses:
            self._sock.setsockopt(_SOL_NETLINK, _DROP_MEMBERSHIP, _GROUP_NFTABLES)
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1
            if not self._pauses and self._sock.fileno() >= 0:  # closed if the proxy stops meanwhile
                self._sock.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _GROUP_NFTABLES)

    def concerns_us(self, datagram: bytes) -> bool:
        return any(table in self._tables for table in tables_in(datagram))


class NetworkNotices(_Notices):
    """Calls *on_change* when interfaces, addresses or routes of this host change."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        super().__init__(netlink.ROUTE, _GROUPS_NETWORK, on_change)


class RoutingRuleNotices(_Notices):
    """Calls *on_change* when routing rules (``ip rule``) of this host change."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        super().__init__(netlink.ROUTE, _GROUPS_RULES, on_change)


class RuleWatch:
    """Calls a function when another program may have changed our rules: by the kernel's notices, or by polling.

    ``is_touched``: a notice has come since the holder of the rules last cleared it.
    """

    def __init__(self) -> None:
        self.is_touched = False
        self._on_change: Callable[[], None] | None = None
        self._notices: RuleNotices | None = None
        self._pause_s: Callable[[], float] | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_polling(self) -> bool:
        return self._pause_s is not None

    def listen(self, tables: Collection[str], on_change: Callable[[], None]) -> None:
        """Call *on_change* when another program changes one of the nftables *tables*, until `stop`."""

        def on_notice() -> None:
            self.is_touched = True
            on_change()

        self._on_change = on_change
        self._notices = RuleNotices(tables, on_notice)

    def poll(self, pause_s: Callable[[], float], on_change: Callable[[], None]) -> None:
        """Call *on_change* again and again, for rules whose changes send no notices, until `stop`."""

        def due() -> None:
            self._call_in(pause_s(), due)
            on_change()

        self._pause_s = pause_s
        self._call_in(pause_s(), due)

    def check_after(self, pause_s: float) -> None:
        """Call the function of `listen` in *pause_s*: notices are ignored during a load. A later call replaces it."""
        if self._on_change is not None:
            self._call_in(pause_s, self._on_change)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Ignore notices within the block, which loads rules."""
        with self._notices.paused() if self._notices is not None else contextlib.nullcontext():
            yield

    def stop(self) -> None:
        self._on_change = self._pause_s = None
        if self._timer is not None:
            self._timer.cancel()
        if self._notices is not None:
            self._notices.close()
            self._notices = None

    def _call_in(self, pause_s: float, call: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(pause_s, call)


def tables_in(datagram: bytes) -> Iterator[bytes]:
    """Yield the table name of each nf_tables message in *datagram*."""
    for kind, body in netlink.messages(datagram):
        if kind & 0xFF00 == NFTABLES and kind != _NEWGEN and len(body) >= 8:
            size, attribute = struct.unpack_from("=HH", body, 4)
            if attribute == ATTR_TABLE and 4 + size <= len(body):
                yield body[8 : 4 + size].rstrip(b"\0")
