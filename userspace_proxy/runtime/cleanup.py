"""Taking away what a proxy of ours has left: all of it, or what it had in other modes than the one it runs in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path

from userspace_proxy.config.settings import Settings
from userspace_proxy.errors import StartError, SyncError
from userspace_proxy.host import network
from userspace_proxy.host.discard_routes import remove_discard_routes
from userspace_proxy.modes.userspace.loader import KERNELS
from userspace_proxy.runtime.instance_lock import end_orphans, running_as
from userspace_proxy.runtime.parts import KERNEL_MODES

_CAP_NET_ADMIN = 12

_Removal = Callable[[], Awaitable[None]]


async def remove_all() -> None:
    """Remove everything that a proxy of ours, running no more, has left in this network namespace.

    Raises:
        StartError: one is running; or no privilege.
        SyncError: something could not be removed; all else was.
    """
    require_net_admin()
    if (present := await end_orphans()) is not None:
        raise StartError(f"userspace-proxy{running_as(present)} is running; stop it, it takes its rules away itself")
    of_network = [remove_discard_routes, network.remove_routes, network.remove_local_addresses]
    await _take_each([*_removals_of_others(), *of_network])


async def remove_others(mode: str, language: str) -> None:
    """Remove what rules there are of ours, but those of *mode*, and in userspace mode of *language*.

    Raises:
        SyncError: some could not be removed; all others were.
    """
    await _take_each(_removals_of_others(mode, language))


def _removals_of_others(mode: str = "", language: str = "") -> Iterator[_Removal]:
    for other, make_tables in KERNEL_MODES.items():
        if other != mode:
            yield make_tables(Settings()).remove
    for other, make_kernel in KERNELS.items():
        if mode != "userspace":
            yield make_kernel().remove
        elif other != language:
            yield make_kernel().remove_rules  # not what brings answers here, which both languages share


async def _take_each(removals: Iterable[_Removal]) -> None:
    refused = []
    for remove in removals:
        try:
            await remove()
        except SyncError as error:
            refused.append(str(error))
    if refused:
        raise SyncError("; ".join(dict.fromkeys(refused)))


def require_net_admin() -> None:
    status = Path("/proc/self/status").read_text()
    effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff"))
    if not int(effective, 16) >> _CAP_NET_ADMIN & 1:
        raise StartError(
            "changing rules needs CAP_NET_ADMIN; run it with sudo, "
            "or try `userspace-proxy demo`, which needs no privileges"
        )
