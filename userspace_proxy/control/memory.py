"""Allocations that survive a restart, in one small file."""

import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path

import msgspec

from userspace_proxy.control.pools import address_of
from userspace_proxy.errors import ConfigError
from userspace_proxy.sources.paths import read, replace_file

log = logging.getLogger(__name__)

_NAME = "allocations.json"


class SavedAllocations(msgspec.Struct, rename="camel", frozen=True):
    """The content of the file: key -> allocated value.

    ``cluster_ips`` and ``load_balancer_ips``: "namespace/name/IPv4" -> IP. ``node_ports``:
    "namespace/name:port_name/TCP" -> number. ``proxy_ports``: a listener's key -> port. ``external_portals``:
    "IP:port/TCP" -> "namespace/name" of the Service that gets it.
    """

    version: int = 1
    cluster_ips: Mapping[str, str] = {}
    load_balancer_ips: Mapping[str, str] = {}
    node_ports: Mapping[str, int] = {}
    proxy_ports: Mapping[str, int] = {}
    external_portals: Mapping[str, str] = {}


class StateDir:
    """A folder that outlives the process. If it is lost or corrupt, addresses and ports may change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / _NAME
        self._failure = ""
        self._saving = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True, mode=0o755)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "permission denied", str(folder))

    def load(self) -> SavedAllocations:
        try:
            memory = msgspec.json.decode(read(str(self._file)), type=SavedAllocations)
            for ip in (*memory.cluster_ips.values(), *memory.load_balancer_ips.values()):
                address_of(ip)
        except FileNotFoundError:
            return SavedAllocations()
        except (OSError, ConfigError, msgspec.DecodeError, ValueError) as error:
            log.warning("%s cannot be used, addresses may move: %s", self._file, error)
            return SavedAllocations()
        return memory

    def save(self, memory: SavedAllocations) -> bool:
        """Replace the file atomically; return whether that succeeded. A repeated failure is logged once."""
        with self._saving:  # an older save must not overwrite the last one
            failure = self._replace(memory)
        if failure and failure != self._failure:
            log.warning("%s cannot be written, addresses may move at the next start: %s", self._file, failure)
        elif self._failure and not failure:
            log.info("%s can be written again", self._file)
        self._failure = failure
        return not failure

    def _replace(self, memory: SavedAllocations) -> str:
        """Replace the file with *memory*; return the error text, or "" on success."""
        try:
            replace_file(self._file, msgspec.json.format(msgspec.json.encode(memory, order="sorted")))
        except OSError as error:
            return error.strerror or str(error)
        return ""
