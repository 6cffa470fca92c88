"""Kernel notices that another program changed rules (nfnetlink multicast group 7) or the network (rtnetlink).

Notices about rules arrive within milliseconds, for nft and for iptables on nf_tables. Loads by this process cause
thousands of them. So it leaves the group while it loads (`paused`), and the caller checks once afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import Callable, Collection, Iterator

_NETLINK_NETFILTER = 12
_NETLINK_ROUTE = 0
_GROUPS_LINK_ADDRESS_ROUTE = 0x1 | 0x10 | 0x40
_SOL_NETLINK = 270
_ADD_MEMBERSHIP, _DROP_MEMBERSHIP = 1, 2
_GROUP_NFTABLES = 7
_SUBSYSTEM_NFTABLES = 10
_NEWGEN = 15
_ATTR_TABLE = 1  # the first attribute of every message about a table, chain, rule, set or element

log = logging.getLogger(__name__)


class _Notices:
    """A netlink socket read by the event loop."""

    def __init__(self, protocol: int, groups: int, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        self._sock = socket.socket(socket.AF_NETLINK, kind, protocol)
        self._sock.bind((0, groups))
        self._loop.add_reader(self._sock.fileno(), self._read)

    def close(self) -> None:
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()

    def _read(self) -> None:
        noted = False
        while True:
            try:
                datagram = self._sock.recv(1 << 17)
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
        super().__init__(_NETLINK_NETFILTER, 0, on_change)
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


def quiet(notices: RuleNotices | None) -> contextlib.AbstractContextManager[None]:
    """Return a context in which *notices*, if any, are paused."""
    return notices.paused() if notices is not None else contextlib.nullcontext()


class NetworkNotices(_Notices):
    """Calls *on_change* when interfaces, addresses or IPv4 routes of this host change."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        super().__init__(_NETLINK_ROUTE, _GROUPS_LINK_ADDRESS_ROUTE, on_change)


class LaterLook:
    """Calls *on_change* once no load has run for a while.

    A check is needed because notices are ignored during a load. It is delayed because it takes time.
    """

    def __init__(self) -> None:
        self._on_change: Callable[[], None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change

    def after(self, pause_s: float) -> None:
        """Schedule the check in *pause_s*; a later call replaces an earlier one."""
        if self._timer is not None:
            self._timer.cancel()
        if self._on_change is not None:
            self._timer = asyncio.get_running_loop().call_later(pause_s, self._on_change)

    def end(self) -> None:
        self._on_change = None
        self.after(0)


async def call_often(pause_s: Callable[[], float], call: Callable[[], None]) -> None:
    """Call *call* repeatedly, for changes that send no notices. Runs until cancelled."""
    while True:
        await asyncio.sleep(pause_s())
        call()


def tables_in(datagram: bytes) -> Iterator[bytes]:
    """Yield the table name of each nf_tables message in *datagram*."""
    at = 0
    while at + 20 <= len(datagram):
        length, kind = struct.unpack_from("=IH", datagram, at)
        if length < 20 or at + length > len(datagram):  # truncated
            return
        if kind >> 8 == _SUBSYSTEM_NFTABLES and kind & 0xFF != _NEWGEN:
            size, attribute = struct.unpack_from("=HH", datagram, at + 20) if length >= 24 else (0, 0)
            if attribute == _ATTR_TABLE:
                yield datagram[at + 24 : at + 20 + size].rstrip(b"\0")
        at += (length + 3) & ~3
