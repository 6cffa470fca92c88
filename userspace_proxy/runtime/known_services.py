"""Open a source for commands that need no running proxy, and read the Services in it."""

from __future__ import annotations

import contextlib
import logging
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from userspace_proxy.api.events import EventType
from userspace_proxy.config.settings import DEFAULT_STATE_DIR, Settings
from userspace_proxy.control import pod_names
from userspace_proxy.control.allocations import Allocations
from userspace_proxy.control.memory import SavedAllocations, StateDir
from userspace_proxy.control.pod_names import KnownService
from userspace_proxy.control.tracker import Tracker
from userspace_proxy.errors import StartError
from userspace_proxy.model.names import NamespacedName
from userspace_proxy.runtime.desired_state import make_allocations
from userspace_proxy.sources.files import FileSource

if TYPE_CHECKING:
    from userspace_proxy.sources.kubernetes import KubernetesSource

log = logging.getLogger(__name__)


def default_kubeconfig() -> Path:
    """Return the kubeconfig that kubectl would use.

    Raises:
        StartError: there is no such file.
    """
    path = Path(os.environ.get("KUBECONFIG") or Path.home() / ".kube" / "config")
    if not path.is_file():
        raise StartError(f"there is no {path}; give --kubeconfig FILE, or manifests")
    return path


async def open_services(
    paths: Sequence[str], kubeconfig: Path | None, name: NamespacedName | None, stack: contextlib.AsyncExitStack
) -> FileSource | KubernetesSource:
    """Return a source of Services and their endpoints: from *paths*, or else from a cluster; of *name* alone if given.

    Raises:
        StartError: there is no such source.
    """
    if paths:
        return FileSource(paths)
    from userspace_proxy.sources.kubernetes import KubernetesSource, service_reflectors
    from userspace_proxy.sources.login import ApiTransport
    from userspace_proxy.sources.reflector import Pace

    transport = ApiTransport(kubeconfig or default_kubeconfig())
    stack.push_async_callback(transport.close)
    await transport.open()
    jitter = random.Random()  # noqa: S311
    return KubernetesSource(service_reflectors(transport, name, Pace(), jitter), for_dns=True)


async def known_services(settings: Settings) -> Mapping[NamespacedName, KnownService]:
    """Return the Services of the manifests or the cluster of *settings*, with the addresses that `run` gives them.

    Raises:
        StartError: there is no such source.
    """
    async with contextlib.AsyncExitStack() as stack:
        source = await open_services(settings.paths, settings.kubeconfig, None, stack)
        is_cluster = not settings.paths
        allocations = Allocations() if is_cluster else make_allocations(settings, _remembered(settings.state_dir))
        tracker = Tracker(allocations)
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
        said = "%s cannot be read (%s): addresses that Services do not state may differ from those of a running proxy"
        log.warning(said, folder or DEFAULT_STATE_DIR, (error.strerror or str(error)).lower())
    return SavedAllocations()
