"""Runs system tools (nft, iptables-restore, ip), never through a shell."""

import asyncio
import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from typing import Any, TypeVar

from userspace_proxy import absolute_entries
from userspace_proxy.errors import NotRunError, SyncError

_PACKAGE = {
    "nft": "nftables",
    "iptables": "iptables",
    "iptables-restore": "iptables",
    "iptables-save": "iptables",
    "ip6tables": "iptables",
    "ip6tables-restore": "iptables",
    "ip6tables-save": "iptables",
    "ip": "iproute2",
    "modprobe": "kmod",
}
_TIMEOUT_S = 60.0

_Result = TypeVar("_Result")


def is_installed(tool: str) -> bool:
    """Return whether *tool* is installed."""
    return find_tool(tool) is not None


def find_tool(tool: str) -> str | None:
    """Return the path of *tool*, also if PATH lacks the sbin folders, or None if it is not installed.

    Relative entries of PATH are skipped: the tool runs with this process's privileges.
    """
    folders = absolute_entries(os.environ.get("PATH", os.defpath))
    return shutil.which(tool, path=f"{folders}:/usr/sbin:/sbin:/usr/local/sbin".lstrip(":"))


async def run_tool(tool: str, *arguments: str, stdin: str = "") -> str:
    """Run *tool* and return its standard output.

    Raises:
        SyncError: *tool* is not installed (the message names the package), failed (its first error line), or timed out.
    """
    path = find_tool(tool)
    if path is None:
        raise SyncError(f"{tool} is not installed; install the package {_PACKAGE.get(tool, tool)}")
    try:
        # In a thread: uvloop's own subprocesses raise when a tool ends before it has read its input.
        done = await in_thread(_run, [path, *arguments], stdin.encode())
    except OSError as error:  # out of descriptors, memory or threads
        raise NotRunError(f"{tool} could not be started: {error}") from error
    except subprocess.TimeoutExpired:
        raise NotRunError(f"{tool} has not answered for {_TIMEOUT_S:.0f} s") from None
    if done.returncode:
        raise SyncError(f"{tool} exited {done.returncode}: {_reason(done.stderr.decode(errors='replace'))}")
    return done.stdout.decode(errors="replace")


async def load_nft(script: str, *, is_dry_run: bool = False) -> None:
    """Apply *script*, in nft's language, as one transaction. *is_dry_run*: the kernel checks it and changes nothing.

    Raises:
        SyncError: the kernel refused *script*; nothing was changed.
    """
    await run_tool("nft", *(["-c"] if is_dry_run else []), "-f", "-", stdin=script)


async def in_thread(call: Callable[..., _Result], *arguments: object) -> _Result:
    """Run *call* in a thread and return its result; cancellation waits until it ends.

    A load under way cannot be undone.

    Raises:
        OSError: no thread can be started.
    """
    try:
        running = asyncio.get_running_loop().run_in_executor(None, call, *arguments)
    except RuntimeError as error:
        raise OSError(errno.EAGAIN, str(error)) from error
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise


def _run(command: list[str], stdin: bytes) -> subprocess.CompletedProcess[bytes]:
    # Use a separate process group, so that Ctrl-C does not end a removal half-way.
    return subprocess.run(command, input=stdin, capture_output=True, timeout=_TIMEOUT_S, check=False, process_group=0)


def _reason(stderr: str) -> str:
    """Return the line of *stderr* that gives the reason, with a hint for missing privileges."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    reason = next(
        (line for line in lines if any(word in line for word in ("rror", "denied", "FATAL", "failed"))),
        lines[0] if lines else "no reason given",
    )
    if "not permitted" in stderr or "ermission denied" in stderr:
        reason += "; run as root or with CAP_NET_ADMIN"
    return reason


def parsed(text: str) -> Any:
    """Return *text*, JSON printed by a tool, as Python values; [] if it is empty. Raises SyncError."""
    try:
        return json.loads(text) if text.strip() else []
    except ValueError as error:
        raise SyncError(f"a tool printed invalid JSON: {error}") from None
