"""Remove what a proxy has left on this host: all of it, or what it left in other modes than the one in use."""

import asyncio
import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

from userspace_proxy.config.settings import Settings
from userspace_proxy.dns.wire import MODULE as DNS_MODULE
from userspace_proxy.errors import StartError, SyncError
from userspace_proxy.host import network
from userspace_proxy.host.discard_routes import remove_discard_routes
from userspace_proxy.modes import MODES
from userspace_proxy.modes.mode import CleanUp, Mode, PreparedMode
from userspace_proxy.runtime.hung_workers import has_ended
from userspace_proxy.runtime.instance_lock import end_orphans, running_as

_CAP_NET_ADMIN = 12
_ENDED_S = 5.0


async def remove_all() -> None:
    """Remove everything that ended proxies have left in this network namespace.

    Raises:
        StartError: a proxy is running, or CAP_NET_ADMIN is missing.
        SyncError: something could not be removed; all else was.
    """
    require_net_admin()
    if (present := await end_orphans()) is not None:
        raise StartError(f"userspace-proxy{running_as(present)} is running; stop it, it takes its rules away itself")
    of_modes = [clean_up for mode in MODES.values() for clean_up in mode.clean_ups(Settings())]
    of_network = [remove_discard_routes, network.remove_routes, network.remove_local_addresses]
    with contextlib.ExitStack() as stack:
        dns_processes = _orphaned_dns(stack)
        await _run_each([*of_modes, *of_network])
        # They end by themselves, as their address is gone.
        await asyncio.gather(*(asyncio.to_thread(has_ended, pidfd, _ENDED_S) for pidfd in dns_processes))


def _orphaned_dns(stack: contextlib.ExitStack) -> list[int]:
    """Return a pidfd of each DNS process in this network namespace, which *stack* closes."""
    found, here = [], Path("/proc/self/ns/net").stat().st_ino
    for process in Path("/proc").glob("[0-9]*"):
        # OSError: it has ended, or is another user's.
        with contextlib.suppress(OSError), contextlib.ExitStack() as of_process:
            pidfd = os.pidfd_open(int(process.name))
            of_process.callback(os.close, pidfd)
            arguments = (process / "cmdline").read_bytes().split(b"\0")
            if DNS_MODULE.encode() in arguments and (process / "ns/net").stat().st_ino == here:
                found.append(pidfd)
                stack.push(of_process.pop_all())
    return found


async def remove_others(used: Mode, prepared: PreparedMode) -> None:
    """Remove the rules of other modes than *used*, and what that one left in another rule language.

    Raises:
        SyncError: some could not be removed; all others were.
    """
    of_others = [clean_up for mode in MODES.values() if mode is not used for clean_up in mode.clean_ups(Settings())]
    await _run_each([*of_others, *prepared.leftovers])


async def _run_each(clean_ups: Iterable[CleanUp]) -> None:
    refused = []
    for remove in clean_ups:
        try:
            await remove()
        except SyncError as error:
            refused.append(str(error))
    if refused:
        raise SyncError("; ".join(dict.fromkeys(refused)))


def require_net_admin() -> None:
    """Raise StartError unless this process has CAP_NET_ADMIN."""
    status = Path("/proc/self/status").read_text()
    effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff"))
    if not int(effective, 16) >> _CAP_NET_ADMIN & 1:
        raise StartError(
            "changing rules needs CAP_NET_ADMIN; run it with sudo, "
            "or try `userspace-proxy demo`, which needs no privileges"
        )
