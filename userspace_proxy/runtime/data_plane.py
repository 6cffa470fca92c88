"""Make the data plane: in a worker process, or in this one."""

from __future__ import annotations

import contextlib

from userspace_proxy.config.settings import Settings
from userspace_proxy.dataplane.connections import Limits
from userspace_proxy.dataplane.handover import HandoverPlane
from userspace_proxy.dataplane.plane import LocalPlane
from userspace_proxy.dataplane.remote import RemotePlane
from userspace_proxy.dataplane.sockets import knows_congestion_control
from userspace_proxy.dataplane.wire import WorkerSettings
from userspace_proxy.errors import StartError
from userspace_proxy.host import network
from userspace_proxy.logs import AccessLog, drop_count, recorder, require_writable
from userspace_proxy.modes.mode import Mode


def make_plane(settings: Settings, mode: Mode, stack: contextlib.AsyncExitStack) -> HandoverPlane:
    """Return the data plane.

    It runs in this process with ``--workers 0``, and in modes in which the kernel serves: there it opens nothing.
    """
    if mode.kernel_serves:
        return LocalPlane(Limits())
    try:
        if settings.access_log:
            require_writable(settings.access_log)
    except OSError as error:
        reason = "its folder does not exist" if isinstance(error, FileNotFoundError) else error.strerror
        raise StartError(f"--access-log {settings.access_log}: {reason}") from None
    if settings.workers == 0:
        access_log = AccessLog(settings.access_log, settings.log_format) if settings.access_log else None
        if access_log is not None:
            stack.callback(access_log.close)
        record = recorder(access_log, verbose=settings.verbose)
        return LocalPlane(_limits(settings), record, splice=settings.splice, lines_dropped=drop_count(access_log))
    plane = RemotePlane(
        WorkerSettings(
            limits=_limits(settings),
            workers=settings.workers,
            orphan_timeout_s=settings.orphan_timeout_s,
            drain_timeout_s=settings.drain_timeout_s,
            splice=settings.splice,
            loop=settings.loop,
            access_log=settings.access_log,
            log_format=settings.log_format,
            verbose=settings.verbose,
        )
    )
    plane.start()
    return plane


def _limits(settings: Settings) -> Limits:
    name = settings.congestion_control
    if name and not knows_congestion_control(name):
        raise StartError(
            f"--congestion-control {name}: not on this host (modprobe tcp_{name}?);"
            " sysctl net.ipv4.tcp_available_congestion_control lists what is"
        )
    unanswered_s, answered_s = network.conntrack_udp_timeouts()
    return Limits(
        idle_timeout_s=settings.idle_timeout_s,
        half_closed_timeout_s=settings.half_closed_timeout_s,
        dead_peer_timeout_s=settings.dead_peer_timeout_s,
        connections_per_client=settings.connections_per_client,
        congestion_control=settings.congestion_control,
        udp_flows_per_service=settings.udp_flows_per_service,
        udp_port_rest_s=settings.udp_port_rest_s,
        udp_timeout_s=unanswered_s if settings.udp_timeout_s is None else settings.udp_timeout_s,
        udp_stream_timeout_s=answered_s if settings.udp_timeout_s is None else settings.udp_timeout_s,
    )
