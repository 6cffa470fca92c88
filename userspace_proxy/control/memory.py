"""What the next process should know of this one: what it allocated, in one small file."""

from __future__ import annotations

import ipaddress
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec

log = logging.getLogger(__name__)

_NAME = "allocations.json"


class Memory(msgspec.Struct, rename="camel", frozen=True):
    """The file's content: by whom it is remembered -> what it is.

    ``cluster_ips``: "namespace/name/IPv4" -> IP, ``load_balancer_ips`` likewise; ``node_ports``:
    "namespace/name:port_name/TCP" -> number; ``proxy_ports``: a listener's key -> port; ``external_portals``:
    "IP:port/TCP" -> "namespace/name" of the Service that has it.
    """

    version: int = 1
    cluster_ips: Mapping[str, str] = {}
    load_balancer_ips: Mapping[str, str] = {}
    node_ports: Mapping[str, int] = {}
    proxy_ports: Mapping[str, int] = {}
    external_portals: Mapping[str, str] = {}


class StateDir:
    """A folder that outlives the process. Losing it, or finding nonsense in it, costs stable numbers and no traffic."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / _NAME
        folder.mkdir(parents=True, exist_ok=True, mode=0o755)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "permission denied", str(folder))

    def load(self) -> Memory:
        try:
            memory = msgspec.json.decode(self._file.read_bytes(), type=Memory)
            for ip in (*memory.cluster_ips.values(), *memory.load_balancer_ips.values()):
                ipaddress.ip_address(ip)
        except FileNotFoundError:
            return Memory()
        except (OSError, msgspec.DecodeError, ValueError) as error:
            log.warning("%s cannot be used, addresses may move: %s", self._file, error)
            return Memory()
        return memory

    def save(self, memory: Memory) -> None:
        """Replace the file, whole or not at all; a failure is reported and costs only the memory."""
        temporary = None
        try:
            # A name of its own: another process may save at the same time, in a container even with our process id.
            descriptor, name = tempfile.mkstemp(dir=self._file.parent, prefix=f"{_NAME}.")
            temporary = Path(name)
            with open(descriptor, "wb") as out:  # noqa: PTH123 - a descriptor
                out.write(msgspec.json.format(msgspec.json.encode(memory, order="sorted")))
                out.flush()
                os.fsync(out.fileno())
            temporary.replace(self._file)
        except OSError as error:
            log.warning("%s cannot be written, addresses may move at the next start: %s", self._file, error)
            if temporary is not None:
                temporary.unlink(missing_ok=True)
