"""Let processes of this program find each other in a network namespace, each proving CAP_NET_ADMIN there.

No socket name is trusted: any local user can bind an abstract socket. The kernel requires CAP_NET_ADMIN, in the user
namespace that owns the network namespace, to join this multicast group and to send to it. Therefore:

- A *member* is a netlink socket in the group. No process without CAP_NET_ADMIN can be one, so none can hold or block
  the lock. Membership ends with the last process that has the socket, and /proc/net/netlink lists all members.
- A *call* is sent to the group. It names a unix socket of the caller and carries two secrets. A member answers by
  sending one of them there; the caller then sends the other. Both have thereby proven to be in the group.
"""

import asyncio
import contextlib
import errno
import hmac
import secrets
import socket
import struct
import sys
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path

import msgspec

from userspace_proxy import netlink
from userspace_proxy.dataplane.sockets import closed_on_error
from userspace_proxy.netlink import attributes, message, messages

# RTNLGRP_IPV4_MROUTE_R, as a bit: rtnetlink_bind() in net/core/rtnetlink.c asks for CAP_NET_ADMIN since Linux 4.13.
# netlink_sendmsg() asks for it wherever a message of this protocol is for another process.
_GROUP = 1 << 29
# linux/sock_diag.h, linux/netlink_diag.h: family, type, protocol, state; then port, its peer and group; inode; cookie.
_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _SHOW_GROUPS, _DIAG_GROUPS = 4, 20, 2, 1
_DIAG_MESSAGE, _DIAG_MESSAGE_BYTES = struct.Struct("=4xIIII"), 28
_DIAG_TIMEOUT_S = 5.0
_NOOP = 1  # NLMSG_NOOP: other members of the group, and the kernel, skip it
_SECRET_BYTES = 16
_DATAGRAM_BYTES = 1 << 12
_BACKLOG = 1024
# Any process can connect to a caller during the few milliseconds of its call. Each has this time to send the secret.
_ADMIT_S = 1.0
_UNADMITTED_MAX = 32
_ANSWER_S = 5.0
_CONNECT_AGAIN_S = 0.02


class Role(IntEnum):
    """The role of a member, in the first byte of its port number, where others see it.

    SERVES: a control process. SERVES_ON: a worker, ready to serve without one. TAKES_TURN: a process that takes over or
    cleans up.
    """

    SERVES = 0x75
    SERVES_ON = 0x76
    TAKES_TURN = 0x77


class Call(msgspec.Struct, frozen=True):
    """A call. *name*: the caller's abstract socket. *by_member*, *by_caller*: the secret that each must send there."""

    name: str
    by_member: bytes
    by_caller: bytes


_calls = msgspec.msgpack.Decoder(Call)


def join(role: Role) -> socket.socket:
    """Return a new member socket; raises PermissionError without CAP_NET_ADMIN."""
    raw = socket.SOCK_RAW | socket.SOCK_NONBLOCK
    with closed_on_error(socket.socket(socket.AF_NETLINK, raw, socket.NETLINK_ROUTE)) as sock:
        while True:
            try:
                sock.bind(((role << 24) + secrets.randbits(24), _GROUP))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:  # a random number cannot be occupied on purpose: retry
                    raise
            else:
                return sock


def port_of(member: socket.socket) -> int:
    number: int = member.getsockname()[0]
    return number


def members(*roles: Role) -> dict[int, int]:
    """Return the port numbers of the members in *roles* of this network namespace, each with its inode."""
    try:
        listed = list(_sockets_by_diag())
    except OSError:
        listed = list(_sockets_by_proc())
    return {port: inode for port, groups, inode in listed if groups & _GROUP and port >> 24 in roles}


def _sockets_by_diag() -> Iterator[tuple[int, int, int]]:
    """Yield port number, groups and inode of each netlink socket; raises OSError without CONFIG_NETLINK_DIAG.

    One pass over the sockets. /proc/net/netlink restarts with every page read: another user's 15,000 sockets take 1.2
    s.
    """
    request = struct.pack("=BBHIIII", socket.AF_NETLINK, socket.NETLINK_ROUTE, 0, 0, _SHOW_GROUPS, 0, 0)
    with netlink.open_socket(_NETLINK_SOCK_DIAG, _DIAG_TIMEOUT_S) as sock:
        request = message(_SOCK_DIAG_BY_FAMILY, netlink.REQUEST | netlink.DUMP, request)
        for kind, body in netlink.dump(sock, request):
            if kind != _SOCK_DIAG_BY_FAMILY:
                raise OSError(errno.EOPNOTSUPP, "netlink sockets cannot be listed")
            port, _, _, inode = _DIAG_MESSAGE.unpack_from(body)
            groups = dict(attributes(body[_DIAG_MESSAGE_BYTES:])).get(_DIAG_GROUPS, b"")
            yield port, int.from_bytes(groups[:4], sys.byteorder), inode


def _sockets_by_proc() -> Iterator[tuple[int, int, int]]:
    with open("/proc/thread-self/net/netlink") as listed:  # noqa: PTH123 - read line by line
        for line in listed:
            fields = line.split()
            if fields[1] == str(socket.NETLINK_ROUTE):
                yield int(fields[2]), int(fields[3], 16), int(fields[9])


def process_of(inode: int) -> int:
    """Return the PID of a process that holds the socket *inode*, or 0 if none is visible (another PID namespace)."""
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it has just ended, or is another user's
            for descriptor in (process / "fd").iterdir() if process.name.isdigit() else ():
                with contextlib.suppress(OSError):  # it has just been closed
                    if str(descriptor.readlink()) == f"socket:[{inode}]":
                        return int(process.name)
    return 0


# ---- members


def heard(member: socket.socket) -> Iterator[Call]:
    """Yield the calls received so far."""
    while True:
        try:
            datagram, (sender, _) = member.recvfrom(_DATAGRAM_BYTES)
        except OSError as error:
            if error.errno == errno.ENOBUFS:  # some calls are lost; callers repeat them
                continue
            return
        if sender:  # otherwise it is a message from the kernel
            yield from _calls_in(datagram)


def _calls_in(datagram: bytes) -> Iterator[Call]:
    for kind, body in messages(datagram):
        if kind == _NOOP:
            with contextlib.suppress(msgspec.DecodeError):
                yield _calls.decode(body)


async def answer(call: Call) -> socket.socket:
    """Return a connection with the caller, which has proven itself; raises OSError, TimeoutError."""
    loop = asyncio.get_running_loop()
    with closed_on_error(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)) as sock:
        async with asyncio.timeout(_ANSWER_S):
            while True:
                try:
                    sock.connect(f"\0{call.name}")
                    break
                except BlockingIOError:  # other processes fill its accept queue
                    await asyncio.sleep(_CONNECT_AGAIN_S)
            await loop.sock_sendall(sock, call.by_member)
            # A plain recv takes no descriptors, which an unproven peer could send.
            if hmac.compare_digest(await loop.sock_recv(sock, _SECRET_BYTES), call.by_caller):
                return sock
        raise ConnectionError("the caller is gone, another process has its name")


# ---- callers


class Caller:
    """Calls all members until closed, and puts those that have answered and proven themselves in ``admitted``."""

    def __init__(self, member: socket.socket) -> None:
        self.admitted: asyncio.Queue[socket.socket] = asyncio.Queue()
        self._member = member
        self._call = Call(
            f"userspace-proxy-{secrets.token_hex(16)}",
            secrets.token_bytes(_SECRET_BYTES),
            secrets.token_bytes(_SECRET_BYTES),
        )
        self._unadmitted: dict[asyncio.Task[bool], None] = {}
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        with closed_on_error(self._listener):
            self._listener.bind(f"\0{self._call.name}")
            self._listener.listen(_BACKLOG)
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def call(self) -> None:
        """Send the call. Members that already talk to this caller ignore it."""
        self._member.sendto(message(_NOOP, 0, msgspec.msgpack.encode(self._call)), (0, _GROUP))

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        sock.setblocking(False)
        if len(self._unadmitted) >= _UNADMITTED_MAX:
            next(iter(self._unadmitted)).cancel()
        task = asyncio.create_task(self._is_proven(sock), name="admit")
        self._unadmitted[task] = None
        task.add_done_callback(lambda done: self._admit(sock, done))

    async def _is_proven(self, sock: socket.socket) -> bool:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_ADMIT_S):
                if hmac.compare_digest(await self._loop.sock_recv(sock, _SECRET_BYTES), self._call.by_member):
                    await self._loop.sock_sendall(sock, self._call.by_caller)
                    return True
        return False

    def _admit(self, sock: socket.socket, done: asyncio.Task[bool]) -> None:
        self._unadmitted.pop(done, None)
        if done.cancelled() or not done.result() or self._closed:
            sock.close()
        else:
            self.admitted.put_nowait(sock)

    def close(self) -> None:
        self._closed = True
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()
        for task in self._unadmitted:
            task.cancel()
        while not self.admitted.empty():
            self.admitted.get_nowait().close()
