"""Which processes can be members, and that others, including root without capabilities, cannot interfere."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys

import pytest

from userspace_proxy.dataplane.rendezvous import (
    Call,
    Caller,
    Role,
    _sockets_by_diag,
    _sockets_by_proc,
    answer,
    heard,
    join,
    members,
    port_of,
    process_of,
)

WITHOUT_CAPABILITIES = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs")
# Everything that would make a member, or speak to one: each line that is printed is one that the kernel allowed.
TRY_ALL = """
import socket, sys
other = int(sys.argv[1])
def attempt(what, call, *arguments):
    try:
        call(*arguments)
    except PermissionError:
        return
    print(what)
def netlink():
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
attempt("join", netlink().bind, (0x75000001, 1 << 29))
attempt("join later", netlink().setsockopt, 270, 1, 30)
attempt("call", netlink().sendto, b"x" * 20, (0, 1 << 29))
attempt("say", netlink().sendto, b"x" * 20, (other, 0))
attempt("connect", netlink().connect, (other, 1 << 29))
netlink().bind((0x75000002, 0))
print("ended")
"""


def test_only_a_process_with_net_admin_can_join_or_speak_to_members() -> None:
    with join(Role.SERVES) as member:
        command = [*WITHOUT_CAPABILITIES, sys.executable, "-c", TRY_ALL, str(port_of(member))]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)

        assert done.stdout == "ended\n"
        assert list(heard(member)) == []


def test_both_ways_of_listing_sockets_find_the_same_members() -> None:
    with join(Role.SERVES) as member, join(Role.TAKES_TURN) as turn:
        by_proc = set(_sockets_by_proc())

        assert {port for port, groups, _ in by_proc if groups} >= {port_of(member), port_of(turn)}
        assert set(_sockets_by_diag()) >= {listed for listed in by_proc if listed[1]}


def test_a_number_alone_makes_no_member() -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as stranger:
        stranger.bind((0x75000003, 0))

        assert 0x75000003 not in members(Role.SERVES)


def test_a_member_is_listed_with_its_process_until_its_last_socket_is_closed() -> None:
    member = join(Role.SERVES)
    number, duplicate = port_of(member), member.dup()
    member.close()

    inode = members(Role.SERVES, Role.SERVES_ON)[number]
    assert process_of(inode) == os.getpid()
    duplicate.close()
    assert number not in members(Role.SERVES)


async def test_a_caller_admits_members_that_heard_its_call_and_no_other_process() -> None:
    with join(Role.SERVES) as member, join(Role.TAKES_TURN) as turn:
        caller = Caller(turn)
        caller.call()
        (call,) = heard(member)
        strangers = [socket.socket(socket.AF_UNIX) for _ in range(100)]
        for number, sock in enumerate(strangers):
            sock.connect(f"\0{call.name}")
            if number % 2:
                sock.send(b"0123456789abcdef")  # the others say nothing

        met = await answer(call)
        admitted = await caller.admitted.get()
        met.send(b"hello")

        assert admitted.recv(10) == b"hello"
        assert caller.admitted.empty()
        caller.close()
        for sock in (*strangers, met, admitted):
            sock.close()


async def test_a_process_that_takes_the_name_of_a_dead_caller_gets_no_message() -> None:
    """It is shown one of the secrets, and does not know the other."""
    call = Call("the name of a caller", b"m" * 16, b"c" * 16)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(f"\0{call.name}")
        stranger.listen()
        answering = asyncio.create_task(answer(call))
        sock, _ = await asyncio.to_thread(stranger.accept)
        sock.send(sock.recv(100))

        with pytest.raises(ConnectionError):
            await answering
        assert sock.recv(100) == b""
        sock.close()
