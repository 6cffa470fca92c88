"""Where desired state comes from, what is allocated and remembered for it, and how it is checked."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import sys
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from userspace_proxy.api.events import EventType
from userspace_proxy.config.settings import DEFAULT_STATE_DIR, Settings
from userspace_proxy.control import decode, pod_names
from userspace_proxy.control.allocations import Allocations, ManifestAllocations
from userspace_proxy.control.hosts import Hosts
from userspace_proxy.control.lint import LintOptions
from userspace_proxy.control.memory import SavedAllocations, StateDir
from userspace_proxy.control.proxy_ports import KUBERNETES_PORTS, ProxyPorts
from userspace_proxy.control.tracker import Tracker
from userspace_proxy.errors import StartError
from userspace_proxy.host import network
from userspace_proxy.interfaces import Source
from userspace_proxy.model.names import NamespacedName
from userspace_proxy.modes import annotation_modes
from userspace_proxy.sources.cached import CachedSource, CacheSettings
from userspace_proxy.sources.events import EventRecorder
from userspace_proxy.sources.files import FileSource

if TYPE_CHECKING:
    from userspace_proxy.sources.kubernetes import KubernetesSource
    from userspace_proxy.sources.login import ApiTransport

_STATE_FILE = "cluster-state"

_Result = TypeVar("_Result")

log = logging.getLogger(__name__)


async def open_source(settings: Settings, stack: contextlib.AsyncExitStack) -> tuple[Source, list[str], EventRecorder]:
    """Return the source, its identity (two processes with the same one serve the same), and the recorder of Events."""
    if not settings.follows_cluster:
        return FileSource(settings.paths), _identity(settings.paths), EventRecorder()
    from userspace_proxy.sources.kubernetes import KubernetesSource, reflectors
    from userspace_proxy.sources.reflector import Pace

    transport, url = await _log_in([settings.kubeconfig] if settings.kubeconfig else [], stack)
    for_dns, proxy_name = bool(settings.dns), settings.service_proxy_name
    following = reflectors(transport, settings.node_name, proxy_name, Pace(), random.Random(), for_dns=for_dns)  # noqa: S311
    log.info("following %s as node %s", url, settings.node_name)
    identity = f"{url} for {proxy_name}" if proxy_name else url
    source: Source = KubernetesSource(following, for_dns=for_dns)
    if settings.cache_state:
        source = CachedSource(source, _cache_settings(settings, f"{identity} on node {settings.node_name}"))
    return source, [identity], EventRecorder(transport.write, settings.node_name)


async def unless_stopped(stop: asyncio.Event, opening: Coroutine[object, object, _Result]) -> _Result:
    """Return the result of *opening*; end this process if *stop* is set before: a credential plugin may hang."""
    opened = asyncio.create_task(opening, name="open source")
    stopped = asyncio.create_task(stop.wait(), name="stop")
    try:
        await asyncio.wait([opened, stopped], return_when=asyncio.FIRST_COMPLETED)
        if not opened.done():
            log.info("stopped before the login was complete")
            sys.exit()
        return opened.result()
    finally:
        opened.cancel()
        stopped.cancel()
        await asyncio.wait([opened, stopped])


async def open_services(
    paths: Sequence[str], kubeconfig: Path | None, name: NamespacedName | None, stack: contextlib.AsyncExitStack
) -> FileSource | KubernetesSource:
    """Return a source of Services and their endpoints, for a command that needs no running proxy.

    From *paths*, or else from the cluster of *kubeconfig* (default: as kubectl); of *name* alone if given.

    Raises:
        StartError: there is no such source.
    """
    if paths:
        return FileSource(paths)
    from userspace_proxy.sources.kubernetes import KubernetesSource, service_reflectors
    from userspace_proxy.sources.reflector import Pace

    transport, _ = await _log_in([kubeconfig] if kubeconfig else _default_kubeconfigs(), stack)
    return KubernetesSource(service_reflectors(transport, name, Pace(), random.Random()), for_dns=True)  # noqa: S311


async def _log_in(kubeconfigs: Sequence[Path], stack: contextlib.AsyncExitStack) -> tuple[ApiTransport, str]:
    from userspace_proxy.sources.login import ApiTransport

    transport = ApiTransport(*kubeconfigs)
    stack.push_async_callback(transport.close)
    return transport, await transport.open()


def _default_kubeconfigs() -> list[Path]:
    """Return the files of $KUBECONFIG that exist, or else kubectl's default."""
    given = os.environ.get("KUBECONFIG") or str(Path.home() / ".kube" / "config")
    found = [Path(file) for file in given.split(os.pathsep) if file and Path(file).is_file()]
    if not found:
        raise StartError(f"there is no {given}; give --kubeconfig FILE, or manifests")
    return found


def _cache_settings(settings: Settings, origin: str) -> CacheSettings:
    folder = settings.state_dir or DEFAULT_STATE_DIR
    if open_state_dir(settings.state_dir) is None:
        raise StartError(f"--cache-state: {folder} cannot be written; choose another --state-dir")
    boot_id = ""
    with contextlib.suppress(OSError):
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    prefix = decode.ANNOTATION_PREFIX
    return CacheSettings(folder / _STATE_FILE, origin, settings.node_name, boot_id, settings.max_state_age_s, prefix)


def _identity(paths: Iterable[str]) -> list[str]:
    """Return the identity of *paths*; each input from stdin has its own."""
    return [f"stdin of process {os.getpid()}" if path == "-" else os.path.realpath(path) for path in paths]


def open_state_dir(folder: Path | None) -> StateDir | None:
    """Return the folder in which allocations are saved, or None if none was given and the default cannot be written.

    Raises:
        StartError: *folder* cannot be used.
    """
    try:
        return StateDir(folder or DEFAULT_STATE_DIR)
    except OSError as error:
        if folder is not None:
            raise StartError(f"--state-dir {folder}: {(error.strerror or str(error)).lower()}") from None
        log.info("%s cannot be written: allocated cluster IPs may move at a restart (--state-dir)", DEFAULT_STATE_DIR)
        return None


def make_allocations(settings: Settings, memory: SavedAllocations, hosts: Hosts | None = None) -> Allocations:
    """Return the allocations of addresses and node ports: those that a cluster's API states, or this process's own."""
    if settings.follows_cluster:
        return Allocations(settings.service_ranges, hosts)
    return ManifestAllocations(
        settings.service_ranges, memory, settings.load_balancer_pool, hosts, settings.dns_addresses
    )


def make_proxy_ports(settings: Settings, remembered: Mapping[str, int]) -> ProxyPorts:
    """Return the allocator of proxy ports."""
    reserved = KUBERNETES_PORTS | network.reserved_ports()
    return ProxyPorts(*settings.proxy_port_range, remembered, reserved)


def lint_options(settings: Settings) -> LintOptions:
    """Return the options of the checks that `run` makes."""
    return LintOptions(
        settings.service_ranges,
        settings.load_balancer_pool,
        settings.service_proxy_name,
        settings.source_ip,
        settings.proxy_mode,
        settings.node_name,
        names_unserved=True,
        annotation_modes=annotation_modes(decode.ANNOTATION_PREFIX),
    )


async def known_services(settings: Settings) -> Mapping[NamespacedName, pod_names.KnownService]:
    """Return the Services of the manifests or the cluster of *settings*, with the addresses that `run` gives them.

    Raises:
        StartError: there is no such source.
    """
    async with contextlib.AsyncExitStack() as stack:
        source = await open_services(settings.paths, settings.kubeconfig, None, stack)
        memory = _remembered(settings.state_dir) if settings.paths else SavedAllocations()
        tracker = Tracker(make_allocations(settings, memory) if settings.paths else Allocations())
        events = await stack.enter_async_context(contextlib.aclosing(source.events()))
        async for batch in events:
            tracker.apply(batch)
            if any(event.type is EventType.SYNCED for event in batch):
                break
    for problem in source.problems.values():
        log.error("%s", problem)
    tracker.state()
    return pod_names.known_services(tracker)


def _remembered(folder: Path | None) -> SavedAllocations:
    """Return the allocations that `run` has saved, or none if this user may not read them."""
    try:
        if folder is not None or DEFAULT_STATE_DIR.is_dir():
            return StateDir(folder or DEFAULT_STATE_DIR).load()
    except OSError as error:
        message = (
            "%s cannot be read (%s): addresses that Services do not state may differ from those of a running proxy"
        )
        log.warning(message, folder or DEFAULT_STATE_DIR, (error.strerror or str(error)).lower())
    return SavedAllocations()
