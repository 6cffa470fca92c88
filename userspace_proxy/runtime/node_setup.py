"""What a proxy runs on: the node, taken from whoever served it before, and what was found and left there."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass

from userspace_proxy.config.settings import Settings
from userspace_proxy.control.hosts import Hosts
from userspace_proxy.control.memory import StateDir
from userspace_proxy.dataplane.connections import Limits
from userspace_proxy.dataplane.plane import LocalPlane
from userspace_proxy.dataplane.sockets import BACKLOG
from userspace_proxy.errors import StartError, SyncError
from userspace_proxy.host import network
from userspace_proxy.interfaces import DataPlane, KernelTables, ListenerSpec, Source
from userspace_proxy.model.service import SourceIP
from userspace_proxy.model.topology import Node
from userspace_proxy.modes.plans import NodeRules
from userspace_proxy.modes.userspace.loader import choose_language
from userspace_proxy.modes.userspace.transparent_replies import transparent_obstacles
from userspace_proxy.runtime.instance_lock import Inheritance, end_orphans, rehearse, take_lock
from userspace_proxy.runtime.lifecycle import Succession, is_rehearsal
from userspace_proxy.runtime.node_network import first_capture, tune_conntrack, widen_queues
from userspace_proxy.runtime.parts import (
    KERNEL_MODES,
    conntrack_limits,
    look_at_hosts,
    make_plane,
    node_rules_of,
    open_source,
    open_state_dir,
)
from userspace_proxy.sources.events import EventRecorder, node_reference

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Ground:
    """What a running proxy stands on: the node, ours to serve from now on, and what was left there.

    ``tables``: of a kernel mode, None in userspace mode; ``language``: of the rules then. ``obstacle``: why clients'
    addresses cannot be kept here. ``tune``: sets conntrack; ``is_tuned``: it could.
    """

    tables: KernelTables | None
    language: str
    source: Source
    sources: list[str]
    events: EventRecorder
    state_dir: StateDir | None
    inheritance: Inheritance
    tune: Callable[[], bool]
    is_tuned: bool
    plane: DataPlane
    inherited: list[ListenerSpec]
    here: Node
    hosts: Hosts
    obstacle: str
    rules: NodeRules


async def take_ground(settings: Settings, succession: Succession, stack: contextlib.AsyncExitStack) -> Ground:
    """Make the node ours to serve, from whoever served it before.

    Raises:
        StartError: it cannot be.
    """
    make_tables = KERNEL_MODES.get(settings.proxy_mode)
    tables = make_tables(settings) if make_tables is not None else None
    # Whatever can say no is asked before the one who serves makes way.
    try:
        if tables is not None:
            await tables.prepare()
        language = choose_language(settings.rules) if tables is None else ""
        obstacle = "; ".join(await transparent_obstacles(language)) if tables is None else ""
        here = Node(settings.node_name, addresses=await network.host_addresses())
    except SyncError as error:
        raise StartError(str(error)) from None
    if obstacle and settings.source_ip is SourceIP.TRANSPARENT:
        raise StartError(f"--source-ip transparent: clients' addresses cannot be kept on this node: {obstacle}")
    source, sources, events = await open_source(settings, stack)
    state_dir = open_state_dir(settings.state_dir)
    workers = settings.workers if tables is None else 0
    if is_rehearsal():
        await rehearse(sources, settings.take_over, workers)
        sys.exit()
    if tables is not None:
        await end_orphans()  # no worker's sockets are of use here
    inheritance = await take_lock(sources, settings.take_over, workers)
    stack.enter_context(contextlib.closing(inheritance))
    try:
        rules = node_rules_of(settings, await first_capture(settings.capture))
    except SyncError as error:
        raise StartError(str(error)) from None
    if "primary" in rules.node_port_addresses:
        on = ", ".join(rules.node_ports_on(here)) or "no address"
        log.info("node ports are served at %s, unless the Node object states other addresses", on)
    widen_queues(BACKLOG)

    def tune() -> bool:
        node = node_reference(settings.node_name)
        return tune_conntrack(conntrack_limits(settings), lambda note: events.warn(node, "FailedToSetConntrack", note))

    is_tuned = tune()  # before the plane, which takes over conntrack's time-outs of UDP
    plane = make_plane(settings, stack) if tables is None else LocalPlane(Limits())  # nothing to open
    inherited = await succession.inherit(plane, inheritance)
    return Ground(
        tables=tables,
        language=language,
        source=source,
        sources=sources,
        events=events,
        state_dir=state_dir,
        inheritance=inheritance,
        tune=tune,
        is_tuned=is_tuned,
        plane=plane,
        inherited=inherited,
        here=here,
        hosts=await look_at_hosts(),
        obstacle=obstacle,
        rules=rules,
    )
