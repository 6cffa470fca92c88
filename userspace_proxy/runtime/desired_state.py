"""Where desired state comes from, what is allocated and remembered for it, and how it is checked."""

from __future__ import annotations

import contextlib
import logging
import os
import random
from collections.abc import Iterable, Mapping
from pathlib import Path

from userspace_proxy.config.settings import DEFAULT_STATE_DIR, Settings
from userspace_proxy.control import decode
from userspace_proxy.control.allocations import Allocations, ManifestAllocations
from userspace_proxy.control.hosts import Hosts
from userspace_proxy.control.lint import LintOptions
from userspace_proxy.control.memory import SavedAllocations, StateDir
from userspace_proxy.control.proxy_ports import KUBERNETES_PORTS, ProxyPorts
from userspace_proxy.errors import StartError
from userspace_proxy.host import network
from userspace_proxy.interfaces import Source
from userspace_proxy.modes import annotation_modes
from userspace_proxy.sources.cached import CachedSource, CacheSettings
from userspace_proxy.sources.events import EventRecorder
from userspace_proxy.sources.files import FileSource

_STATE_FILE = "cluster-state"

log = logging.getLogger(__name__)


async def open_source(settings: Settings, stack: contextlib.AsyncExitStack) -> tuple[Source, list[str], EventRecorder]:
    """Return the source, its identity (two processes with the same one serve the same), and the recorder of Events."""
    if not settings.follows_cluster:
        return FileSource(settings.paths), _identity(settings.paths), EventRecorder()
    from userspace_proxy.sources.kubernetes import KubernetesSource, reflectors
    from userspace_proxy.sources.login import ApiTransport
    from userspace_proxy.sources.reflector import Pace

    transport = ApiTransport(settings.kubeconfig)
    stack.push_async_callback(transport.close)
    url = await transport.open()
    jitter = random.Random()  # noqa: S311
    following = reflectors(
        transport, settings.node_name, settings.service_proxy_name, Pace(), jitter, for_dns=bool(settings.dns)
    )
    log.info("following %s as node %s", url, settings.node_name)
    whose = f" for {settings.service_proxy_name}" if settings.service_proxy_name else ""
    source: Source = KubernetesSource(following, for_dns=bool(settings.dns))
    if settings.cache_state:
        origin = f"{url}{whose} on node {settings.node_name}"
        source = CachedSource(source, _cache_settings(settings, origin))
    return source, [f"{url}{whose}"], EventRecorder(transport.write, settings.node_name)


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
