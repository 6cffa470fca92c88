"""A packet may be between two of our rules while the kernel changes them: it is not lost, whatever is changed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator, Mapping, Set
from dataclasses import replace

import pytest

from tests.modes.redirect_cases import EVERYTHING, TCP, name, redirects
from tests.modes.slots.test_slot_table import FACTS, slot_tables, translation
from userspace_proxy.errors import SyncError
from userspace_proxy.host import tool
from userspace_proxy.lab import Host
from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.redirects import DROPPED
from userspace_proxy.model.routes import Sender
from userspace_proxy.model.service import Portal, ServicePort
from userspace_proxy.modes.element_tables import ElementTables
from userspace_proxy.modes.kernel_rules import RuleUpdate, Translation
from userspace_proxy.modes.slots.slot_table import SlotTable
from userspace_proxy.modes.userspace import nft
from userspace_proxy.modes.userspace.loader import NftKernel
from userspace_proxy.netfilter.nfnetlink import is_dormant

PORTAL, ENDPOINT = ("10.96.0.1", 80), ("10.244.0.5", 8080)
WEB = translation(ServicePort(name("shop/web"), 80, PORTAL[:1]), Endpoint(*ENDPOINT, node_name="here"))
UPDATE = RuleUpdate({WEB.service_port.name: WEB}, [WEB.service_port.name], FACTS)
OTHERS = f"""table ip other {{
    chain output {{
        type nat hook output priority -100;
        ip daddr {PORTAL[0]} tcp dport {PORTAL[1]} dnat to {":".join(map(str, ENDPOINT))}
    }}
}}
"""
CYCLES = 12  # about every third lost a connection when the table was removed in one step, each when loaded awake


@contextlib.contextmanager
def connecting() -> Iterator[list[OSError]]:
    """Serve at ENDPOINT, and connect to PORTAL again and again; yields the errors."""
    errors: list[OSError] = []
    done = threading.Event()
    server = socket.create_server(ENDPOINT, backlog=4096)

    def serve() -> None:
        with contextlib.suppress(OSError):  # shut down
            while True:
                server.accept()[0].close()

    def connect() -> None:
        while not done.is_set():
            with socket.socket() as sock:
                sock.settimeout(0.9)  # a lost SYN is sent again after one second
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                try:
                    sock.connect(PORTAL)
                except OSError as error:
                    errors.append(error)

    serving, *clients = (threading.Thread(target=act, daemon=True) for act in (serve, connect, connect))
    for thread in (serving, *clients):
        thread.start()
    try:
        yield errors
    finally:
        done.set()
        for client in clients:
            client.join(5)
        server.shutdown(socket.SHUT_RDWR)
        serving.join(5)
        server.close()


async def test_a_table_comes_and_goes_beside_rules_that_serve_and_no_connection_is_refused(host: Host) -> None:
    host.run("ip", "address", "add", f"{ENDPOINT[0]}/32", "dev", "lo")
    host.run("ip", "route", "add", "10.96.0.0/16", "dev", "lo")
    host.run("nft", "-f", "-", stdin=OTHERS)
    rules = slot_tables()
    with host.inside(), connecting() as errors:
        for _ in range(CYCLES):
            await rules.load(UPDATE)
            await rules.remove()
    host.run("nft", "delete table ip other")
    host.run("ip", "route", "del", "10.96.0.0/16", "dev", "lo")
    host.run("ip", "address", "del", f"{ENDPOINT[0]}/32", "dev", "lo")

    assert errors == []


async def test_a_load_that_ended_before_its_elements_came_costs_no_packet_when_the_next_one_mends_it(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: ElementTables, *_: object) -> None:
        raise SyncError("killed")

    host.run("ip", "address", "add", f"{ENDPOINT[0]}/32", "dev", "lo")
    host.run("ip", "route", "add", "10.96.0.0/16", "dev", "lo")
    host.run("nft", "-f", "-", stdin=OTHERS)
    with host.inside(), connecting() as errors:
        for _ in range(CYCLES):
            with monkeypatch.context() as patch:
                patch.setattr(ElementTables, "_replace_elements", killed)
                with pytest.raises(SyncError, match="killed"):
                    await slot_tables().load(UPDATE)
            assert is_dormant(SlotTable.name)
            rules = slot_tables()
            await rules.load(UPDATE)
            assert not is_dormant(SlotTable.name)
            await rules.remove()
    host.run("nft", "delete table ip other")
    host.run("ip", "route", "del", "10.96.0.0/16", "dev", "lo")
    host.run("ip", "address", "del", f"{ENDPOINT[0]}/32", "dev", "lo")

    assert errors == []


def handle_of(table: str, host: Host) -> str:
    """Return the number of *table*: another table of the same name has another one."""
    listed = host.run("nft", "-a", "list", "table", *table.split()).stdout
    found = re.search(rf"table {table} {{ # handle (\d+)", listed)
    assert found, table
    return found[1]


async def test_a_restarted_process_keeps_the_table_in_which_packets_are(host: Host) -> None:
    handles = []
    with host.inside():
        for _ in range(2):
            for rules, update in ((NftKernel(), EVERYTHING.update()), (slot_tables(), UPDATE)):
                await rules.load(update)
                rules.unwatch()
            handles.append([handle_of(table, host) for table in (nft.TABLE, SlotTable.name)])
        host.run("nft", f"delete table {nft.TABLE}; delete table {SlotTable.name}")

    assert handles[0] == handles[1]


@pytest.mark.parametrize("is_restarted", [False, True])
async def test_a_sender_with_a_route_of_its_own_is_served_while_a_whole_load_ends_it(
    host: Host, monkeypatch: pytest.MonkeyPatch, *, is_restarted: bool
) -> None:
    served = list[str]()
    by_everybody = redirects((*PORTAL, name("shop/web"), 10_001))
    portal = Portal(*PORTAL, TCP)
    by_node = replace(by_everybody, ports={portal: DROPPED}, exceptions={Sender.NODE: {portal: 10_001}})
    replace_elements = ElementTables._replace_elements

    def dialled(self: ElementTables, to: Mapping[ServicePortName, Translation], needs: Set[str]) -> None:
        for _ in range(2):
            with socket.create_connection(PORTAL, 0.9) as sock:
                served.append(sock.recv(6).decode())
            replace_elements(self, to, needs)

    kernel = NftKernel()
    host.run("ip", "address", "add", f"{ENDPOINT[0]}/32", "dev", "lo")
    host.run("ip", "route", "add", "10.96.0.0/16", "dev", "lo")
    with host.inside(), socket.create_server(("", 10_001)) as server:
        await kernel.load(by_node.update())
        if is_restarted:
            kernel.unwatch()
            kernel = NftKernel()
        kernel._watch.is_touched = True
        answering = threading.Thread(target=_answer, args=(server, 2), daemon=True)
        answering.start()
        with monkeypatch.context() as patch:
            patch.setattr(ElementTables, "_replace_elements", dialled)
            await kernel.load(by_everybody.update(None if is_restarted else by_node))
        answering.join(20)
        is_intact = await kernel.is_intact()
        await kernel.remove()
    host.run("ip", "route", "del", "10.96.0.0/16", "dev", "lo")
    host.run("ip", "address", "del", f"{ENDPOINT[0]}/32", "dev", "lo")

    assert served == ["hello\n"] * 2
    assert is_intact


def _answer(server: socket.socket, times: int) -> None:
    for _ in range(times):
        with server.accept()[0] as client:
            client.sendall(b"hello\n")


async def test_a_table_in_force_is_not_replaced_because_nft_could_not_be_started(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, failures = tool._run, list[str]()

    def run_later(command: list[str], stdin: bytes) -> subprocess.CompletedProcess[bytes]:
        if not failures:
            failures.append(command[0])
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return run(command, stdin)

    with host.inside():
        for rules, update in ((NftKernel(), EVERYTHING.update()), (slot_tables(), UPDATE)):
            table = rules.table.name
            await rules.load(update)
            before = handle_of(table, host)
            failures.clear()
            with monkeypatch.context() as patch:
                patch.setattr(tool, "_run", run_later)
                await rules.reload()
            assert failures
            assert handle_of(table, host) == before
            await rules.remove()


@pytest.mark.parametrize("mode", ["userspace", "nftables"])
async def test_a_table_in_force_with_sets_of_other_types_is_replaced_in_one_step(
    host: Host, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    rules, update = (NftKernel(), EVERYTHING.update()) if mode == "userspace" else (slot_tables(), UPDATE)
    table, seen = rules.table.name, list[tuple[bool, dict[str, list[str]]]]()
    replace_elements = ElementTables._replace_elements

    def look(self: ElementTables, to: Mapping[ServicePortName, Translation], needs: Set[str]) -> None:
        seen.append((is_dormant(table), _elements(host, table)))
        replace_elements(self, to, needs)
        seen.append((is_dormant(table), _elements(host, table)))

    other = " ".join(f"set {each} {{ type mark; }};" for each in rules.table.kinds)
    with host.inside():
        host.run("nft", f"table {table} {{ {other} chain c {{ accept; }}; }}")
        with monkeypatch.context() as patch:
            patch.setattr(ElementTables, "_replace_elements", look)
            await rules.load(update)
        is_intact = await rules.is_intact()
        await rules.remove()

    before, after = seen
    assert before == after == (False, before[1])
    assert before[1]
    assert is_intact


def _elements(host: Host, table: str) -> dict[str, list[str]]:
    """Return the elements of each set and map of *table* that has any, sorted."""
    listed = json.loads(host.run("nft", "--json", "list", "table", *table.split()).stdout)["nftables"]
    sets = [item[kind] for item in listed for kind in ("set", "map") if kind in item]
    return {each["name"]: sorted(map(json.dumps, each["elem"])) for each in sets if each.get("elem")}
