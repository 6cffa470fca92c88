"""Running the system's own tools (nft, iptables-restore, ip, conntrack), never through a shell."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from typing import Any, TypeVar

from userspace_proxy import absolute_entries
from userspace_proxy.errors import SyncError

_PACKAGE = {
    "nft": "nftables",
    "iptables": "iptables",
    "iptables-restore": "iptables",
    "iptables-save": "iptables",
    "ip6tables": "iptables",
    "ip6tables-restore": "iptables",
    "ip6tables-save": "iptables",
    "ip": "iproute2",
    "conntrack": "conntrack",
    "modprobe": "kmod",
}
_TIMEOUT_S = 60.0

_Result = TypeVar("_Result")


def is_installed(tool: str) -> bool:
    """Return whether *tool* is found."""
    return find_tool(tool) is not None


def find_tool(tool: str) -> str | None:
    """Return where *tool* is, also where PATH lacks the administrator's folders; None if it is not installed.

    Never one of the current folder, whatever PATH says: it runs with our privileges.
    """
    folders = absolute_entries(os.environ.get("PATH", os.defpath))
    return shutil.which(tool, path=f"{folders}:/usr/sbin:/sbin:/usr/local/sbin".lstrip(":"))


async def run_tool(tool: str, *arguments: str, stdin: str = "") -> str:
    """Run *tool* and return what it printed.

    Raises:
        SyncError: it is not installed (says in which package it is), failed (its first words), or hung.
    """
    path = find_tool(tool)
    if path is None:
        raise SyncError(f"{tool} is not installed; install the package {_PACKAGE.get(tool, tool)}")
    try:
        # In a thread: uvloop's own subprocesses raise when a tool ends before it has read its input.
        done = await in_thread(_run, [path, *arguments], stdin.encode())
    except (OSError, RuntimeError) as error:  # no descriptor, no memory, no thread
        raise SyncError(f"{tool} could not be started: {error}") from error
    except subprocess.TimeoutExpired:
        raise SyncError(f"{tool} has not answered for {_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        raise SyncError(f"{tool} exited {done.returncode}: {_reason(done.stderr.decode(errors='replace'))}")
    return done.stdout.decode(errors="replace")


async def in_thread(call: Callable[..., _Result], *arguments: object) -> _Result:
    """Call *call* in a thread. Who is cancelled is so when it has ended: a load under way cannot be taken back."""
    running = asyncio.get_running_loop().run_in_executor(None, call, *arguments)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise


def _run(command: list[str], stdin: bytes) -> subprocess.CompletedProcess[bytes]:
    # A process group of its own: Ctrl-C is for us, and must not end a removal half-way.
    return subprocess.run(command, input=stdin, capture_output=True, timeout=_TIMEOUT_S, check=False, process_group=0)


def _reason(stderr: str) -> str:
    """Return the line of *stderr* that says why, with a hint where the usual cause is known."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    said = next(
        (line for line in lines if any(word in line for word in ("rror", "denied", "FATAL", "failed"))),
        lines[0] if lines else "no reason given",
    )
    if "not permitted" in stderr or "ermission denied" in stderr:
        said += "; run as root or with CAP_NET_ADMIN"
    return said


def parsed(text: str) -> Any:
    """Return what a tool printed as JSON; it prints nothing for an empty list. Raises SyncError."""
    try:
        return json.loads(text) if text.strip() else []
    except ValueError as error:
        raise SyncError(f"a tool printed what is no JSON: {error}") from None
