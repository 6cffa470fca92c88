"""A hand-over between neighbouring versions: the other side speaks version 3 as it was, byte by byte.

Nothing of what `Older` says or expects is taken from the code. It is not to be changed with it either, but replaced by
the next version's once no release speaks version 3 any more.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from userspace_proxy.dataplane import wire
from userspace_proxy.dataplane.handover import (
    VERSION,
    Conversation,
    Incumbent,
    Inherit,
    Present,
    Released,
    TakeOver,
    hand_over,
)
from userspace_proxy.dataplane.memory import PickerMemory, Pin
from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.listeners import Backends, ListenerSpec
from userspace_proxy.model.names import L4Protocol, NamespacedName, ServicePortName
from userspace_proxy.model.service import ServicePort
from userspace_proxy.runtime.instance_lock import end_orphans, take_lock

NAME = ServicePortName(NamespacedName("default", "web"), "http", L4Protocol.TCP)
SPEC = ListenerSpec(ServicePort(NAME, 80, ("10.96.4.1",), affinity_timeout_s=10800), 10400)
BACKENDS = Backends((Endpoint("10.244.0.2", 8080, zone_hints=("a",)),), ())
MEMORY = PickerMemory([("192.0.2.1", Pin(("10.244.0.2", 8080), 12.5))], [(("10.244.0.2", 8080), 2, 13.0)])
INHERIT = Inherit(0, wire.Open([SPEC], 1, [(SPEC.name, BACKENDS)], [(NAME, MEMORY)]))

# The same in version 3. An array is a tuple: version 3 refuses one that is longer.
INHERIT_3: dict[str, Any] = {
    "type": "Inherit",
    "worker": 0,
    "listeners": {
        "type": "Open",
        "new": 1,
        "specs": [
            {
                "service_port": {
                    "name": [["default", "web"], "http", "TCP"],
                    "port": 80,
                    "cluster_ips": ["10.96.4.1"],
                    "node_port": 0,
                    "external_ips": [],
                    "affinity_timeout_s": 10800,
                    "load_balancer_ips": [],
                    "source_ranges": [],
                    "internal_local": False,
                    "external_local": False,
                    "health_check_node_port": 0,
                    "source_ip": "node",
                    "ipvs_scheduler": "",
                    "weights": [],
                },
                "proxy_port": 10400,
                "scope": "cluster",
                "transparent": False,
            }
        ],
        "backends": [
            [
                [[["default", "web"], "http", "TCP"], "cluster", False],
                [
                    [
                        {
                            "ip": "10.244.0.2",
                            "port": 8080,
                            "ready": True,
                            "serving": True,
                            "terminating": False,
                            "node_name": None,
                            "zone_hints": ["a"],
                            "node_hints": [],
                        }
                    ],
                    [],
                ],
            ]
        ],
        "memory": [
            [
                [["default", "web"], "http", "TCP"],
                [[["192.0.2.1", [["10.244.0.2", 8080], 12.5]]], [[["10.244.0.2", 8080], 2, 13.0]]],
            ]
        ],
    },
}


def is_understood(known: Any, said: Any) -> bool:
    """Return whether *said* contains all of *known*. Maps may have more fields; arrays may not have more elements."""
    if isinstance(known, dict):
        return isinstance(said, dict) and all(key in said and is_understood(known[key], said[key]) for key in known)
    if isinstance(known, list):
        return isinstance(said, list) and len(said) == len(known) and all(map(is_understood, known, said))
    return bool(known == said)


def with_more_fields(value: Any) -> Any:
    """Return *value* with a field more in each map, as a later version may have."""
    if isinstance(value, dict):
        return {"of_a_later_version": [1], **{key: with_more_fields(held) for key, held in value.items()}}
    return [with_more_fields(held) for held in value] if isinstance(value, list) else value


class Older:
    """One end of a conversation, and one member of the group, in version 3."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    @staticmethod
    def member(role: int) -> socket.socket:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        sock.bind((role << 24 | 4711, 1 << 29))
        sock.settimeout(20)
        return sock

    @classmethod
    def call(cls) -> Older:
        """Call all members, and return a conversation with the first that answers."""
        with socket.socket(socket.AF_UNIX) as listener, cls.member(0x77) as member:
            listener.bind("\0the name of an older caller")
            listener.listen()
            listener.settimeout(20)
            called = {"name": "the name of an older caller", "by_member": b"m" * 16, "by_caller": b"c" * 16}
            body = msgspec.msgpack.encode(called)
            member.sendto(struct.pack("=IHHII", 16 + len(body), 1, 0, 1, 0) + body, (0, 1 << 29))
            sock, _ = listener.accept()
        sock.settimeout(20)
        assert sock.recv(16, socket.MSG_WAITALL) == b"m" * 16
        sock.sendall(b"c" * 16)
        return cls(sock)

    @classmethod
    def answer(cls, member: socket.socket) -> Older:
        """Wait for a call to *member*, and return a conversation with the caller."""
        datagram = member.recv(4096)
        called = msgspec.msgpack.decode(datagram[16 : struct.unpack_from("=I", datagram)[0]])
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(20)
        sock.connect("\0" + called["name"])
        sock.sendall(called["by_member"])
        assert sock.recv(16, socket.MSG_WAITALL) == called["by_caller"]
        return cls(sock)

    def say(self, message: Any, descriptors: list[int] | None = None) -> None:
        body = msgspec.msgpack.encode(message)
        descriptors = descriptors or []
        socket.send_fds(self._sock, [struct.pack("=IH", len(body), len(descriptors)) + body], descriptors)

    def hear(self) -> tuple[Any, array.array[int]]:
        head, descriptors, _, _ = socket.recv_fds(self._sock, 6, 253)
        length, count = struct.unpack("=IH", head)
        assert len(descriptors) == count
        return msgspec.msgpack.decode(self._sock.recv(length, socket.MSG_WAITALL)), array.array("i", descriptors)

    def close(self) -> None:
        self._sock.close()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


async def test_an_older_successor_takes_over(listener: socket.socket) -> None:
    first = await take_lock(["a"], "auto", 1)
    asked: list[TakeOver] = []

    async def give(wish: TakeOver, conversation: Conversation) -> None:
        asked.append(wish)
        await hand_over(conversation, [(INHERIT, [listener.fileno()])], first.name, [listener])
        conversation.send(Released([(NAME, MEMORY)]))

    incumbent = Incumbent(first.member, Present(VERSION, 4711, ["a"]), give)

    def take_over() -> list[Any]:
        older = Older.call()
        heard = [older.hear()]
        older.say({"type": "TakeOver", "version": 3, "pid": 1, "workers": 2, "health_checks": True, "oldest": 3})
        heard += [older.hear() for _ in range(3)]
        older.say({"type": "Taken"})
        heard.append(older.hear())
        older.close()
        for _, descriptors in heard:
            for descriptor in descriptors:
                os.close(descriptor)
        return [(message, len(descriptors)) for message, descriptors in heard]

    present, inherit, checks, name, released = await asyncio.to_thread(take_over)

    known = {"type": "Present", "pid": 4711, "sources": ["a"], "orphan": False, "worker": 0, "workers": 1}
    assert is_understood(known, present[0])
    assert present[0]["version"] >= 3 >= present[0]["oldest"]
    assert is_understood(INHERIT_3, inherit[0])
    assert inherit[1] == 1
    assert (checks[0]["type"], checks[1]) == ("HealthChecks", 1)
    assert (name[0]["type"], name[1]) == ("Lock", 1)
    assert released[0]["type"] == "Released"
    assert [(wish.pid, wish.workers, wish.health_checks) for wish in asked] == [(1, 2, True)]
    incumbent.close()
    first.close()


@pytest.mark.parametrize("role", [0x75, 0x76], ids=["control process", "orphan"])
async def test_from_an_older_or_a_later_process_is_taken_over(role: int, listener: socket.socket) -> None:
    """An older one has fewer fields, a later one more."""
    present = {"type": "Present", "version": 4, "oldest": 3, "pid": 4711, "sources": ["a"], "orphan": role == 0x76}

    def serve(member: socket.socket) -> list[Any]:
        older = Older.answer(member)
        older.say(with_more_fields(present))
        heard = [older.hear()[0]]
        older.say(with_more_fields(INHERIT_3), [listener.fileno()])
        with socket.socket(socket.AF_UNIX) as name:
            older.say(with_more_fields({"type": "Lock"}), [name.fileno()])
        heard.append(older.hear()[0])
        older.say(with_more_fields({"type": "Released"}))
        older.close()
        return heard

    with Older.member(role) as member:
        serving = asyncio.create_task(asyncio.to_thread(serve, member))
        successor = await take_lock(["a"], "auto", 2)
        assert await successor.taken() == [], "an older one does not send the pins that it set last"
        take_over, taken = await serving

    known = {"type": "TakeOver", "version": 3, "pid": os.getpid(), "workers": 2, "health_checks": True}
    assert is_understood(known, take_over)
    assert taken["type"] == "Taken"
    ((inherit, sockets),) = successor.listeners
    assert inherit == INHERIT
    assert sockets[0].getsockname() == listener.getsockname()
    sockets[0].close()
    successor.close()


async def test_an_orphan_of_an_older_version_gets_a_request_to_end() -> None:
    def serve(member: socket.socket) -> Any:
        with member, contextlib.closing(Older.answer(member)) as older:
            older.say({"type": "Present", "version": 3, "pid": 4711, "orphan": True})
            return older.hear()[0]

    serving = asyncio.create_task(asyncio.to_thread(serve, Older.member(0x76)))

    assert await end_orphans() is None
    assert (await serving)["type"] == "End"
