"""A Source that keeps the last good state of another one in a file, and begins with it if the other one is silent.

The other source takes precedence. Once its initial list is complete, objects of the file that it does not have are
deleted. Objects that are the same in both cause no event.
"""

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from userspace_proxy import api
from userspace_proxy.api.events import EventType, ObjectEvent
from userspace_proxy.interfaces import Source
from userspace_proxy.model.names import NamespacedName
from userspace_proxy.model.watch_stats import WatchStats
from userspace_proxy.sources.merged import merged
from userspace_proxy.sources.paths import replace_file

_VERSION = 1
# How long the source may be silent at the start, and how often that is looked at.
_PATIENCE_S = 0.5
_LOOK_S = 0.1
_WRITE_EVERY_S = 3.0
# The time of the file says until when its content was in force.
_CONFIRM_EVERY_S = 30.0
_DIGEST_BYTES = 32

T = TypeVar("T", api.Service, api.EndpointSlice, api.Node)
ObjectKey = tuple[str, NamespacedName]

log = logging.getLogger(__name__)


class _SavedState(msgspec.Struct, frozen=True):
    """The content of the file, after a digest of it. ``origin``: whose state this is, and for which node."""

    version: int
    origin: str
    boot_id: str
    services: list[api.Service]
    slices: list[api.EndpointSlice]
    nodes: list[api.Node]


class CacheSettings(NamedTuple):
    """Where the state is kept, and when it may be used.

    ``origin``: the API server and the node; a file of another origin is not used. ``node_name``: the endpoints of this
    node are not used if ``boot_id`` has changed, as pods then have other addresses. ``max_age_s``: 0 for any age.
    ``annotation_prefix``: only these annotations are kept; others may be long, or confidential.
    """

    file: Path
    origin: str
    node_name: str
    boot_id: str
    max_age_s: float
    annotation_prefix: str


class CachedSource:
    """Reports the objects in the file of *settings* until *source* reports its own."""

    def __init__(self, source: Source, settings: CacheSettings, patience_s: float = _PATIENCE_S) -> None:
        self._source = source
        self._settings = settings
        self._patience_s = patience_s
        self._objects: dict[ObjectKey, api.KubernetesObject] = {}
        self._unconfirmed: set[ObjectKey] = set()  # from the file, and not reported by the source
        self._is_complete = False  # the source has reported every object
        self._saved_at = 0.0  # of the state that is served from the file
        self._changed = asyncio.Event()
        self._failure = ""

    @property
    def problems(self) -> Mapping[str, str]:
        return self._source.problems

    @property
    def watches(self) -> Sequence[WatchStats]:
        return self._source.watches

    @property
    def stale(self) -> str:
        """Why the served state may be outdated (it is from the file); "" if it is from the source."""
        if self._is_complete or not self._saved_at:
            return ""
        age_s = max(0, int(time.time() - self._saved_at))
        age = f"{age_s} s" if age_s < 2 * 60 else f"{age_s // 60} min"
        return f"the API server has not answered since the start; the state of {age} ago is served"

    async def events(self) -> AsyncGenerator[Sequence[ObjectEvent]]:
        self._is_complete = False
        keeping = asyncio.create_task(self._keep(), name="keep the state")
        began_at, has_looked = time.time(), False
        try:
            async with merged({"follow the API": self._source.events()}) as next_batch:
                while True:
                    batch = await next_batch(None if has_looked or self._is_complete else _LOOK_S)
                    events: Sequence[ObjectEvent] = ()
                    if batch is not None:
                        events = self._note(batch)
                    elif has_looked := self._is_silent(began_at):
                        events = await self._cached_events()
                    if events:
                        yield events
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)

    def _is_silent(self, began_at: float) -> bool:
        """Return whether nothing was heard for a while, or every watch has failed."""
        watches, now = self.watches, time.time()
        if all(watch.failing_since is not None for watch in watches):
            return True
        return now - max((watch.heard_at or began_at for watch in watches), default=began_at) > self._patience_s

    def _note(self, batch: Sequence[ObjectEvent]) -> list[ObjectEvent]:
        """Note *batch* of the source; return it with deletions of what it turns out not to know."""
        noted: list[ObjectEvent] = []
        for event in batch:
            if event.name is not None:
                key = (event.kind, event.name)
                self._unconfirmed.discard(key)
                if event.object is None:
                    self._objects.pop(key, None)
                else:
                    self._objects[key] = event.object
            elif event.type is EventType.SYNCED:
                noted += self._complete()
            noted.append(event)
        if self._is_complete:
            self._changed.set()
        return noted

    def _complete(self) -> list[ObjectEvent]:
        """Note that the source has reported all objects; return deletions of those from the file that it has not."""
        if self._saved_at:
            log.info("the API server answers, its state is in force")
        gone, self._unconfirmed = self._unconfirmed, set()
        for key in gone:
            self._objects.pop(key, None)
        self._is_complete = True
        return [ObjectEvent(EventType.DELETE, *key) for key in gone]

    # ---- the file

    async def _cached_events(self) -> list[ObjectEvent]:
        """Return what the file says of objects that are not known yet, and SYNCED; nothing if it cannot be used."""
        saved = await asyncio.to_thread(self._load)
        if saved is None:
            return []
        events = []
        for kind, given in (("Service", saved.services), ("EndpointSlice", saved.slices), ("Node", saved.nodes)):
            for item in given:
                key = (kind, NamespacedName(item.metadata.namespace or "", item.metadata.name))
                if key not in self._objects:
                    self._objects[key] = item
                    self._unconfirmed.add(key)
                    events.append(ObjectEvent(EventType.SET, kind, key[1], item))
        log.warning("%s (%s)", self.stale, self._settings.file)
        return [*events, ObjectEvent(EventType.SYNCED)]

    def _load(self) -> _SavedState | None:
        file, settings = self._settings.file, self._settings
        try:
            if file.exists() and not file.is_file():
                raise ValueError("it is no regular file")  # noqa: TRY301
            content = file.read_bytes()
            saved_at = file.stat().st_mtime
            if hashlib.blake2b(content[_DIGEST_BYTES:], digest_size=_DIGEST_BYTES).digest() != content[:_DIGEST_BYTES]:
                raise ValueError("it is damaged")  # noqa: TRY301
            saved = msgspec.msgpack.decode(content[_DIGEST_BYTES:], type=_SavedState)
            if saved.version != _VERSION:
                raise ValueError(f"it has version {saved.version}")  # noqa: TRY301
            if saved.origin != settings.origin:
                raise ValueError(f"it is of {saved.origin}")  # noqa: TRY301
            if settings.max_age_s and time.time() - saved_at > settings.max_age_s:
                raise ValueError("it is older than --max-state-age")  # noqa: TRY301
        except FileNotFoundError:
            log.info("no state is kept in %s yet; the API server is waited for", file)
            return None
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            log.warning("%s cannot be used, the API server is waited for: %s", file, error)
            return None
        self._saved_at = saved_at
        if saved.boot_id == settings.boot_id:
            return saved
        return msgspec.structs.replace(saved, slices=[self._without_own(piece) for piece in saved.slices])

    def _without_own(self, piece: api.EndpointSlice) -> api.EndpointSlice:
        others = [e for e in piece.endpoints or () if e.node_name != self._settings.node_name]
        return msgspec.structs.replace(piece, endpoints=others)

    async def _keep(self) -> None:
        """Write the state soon after it changes; confirm it while it does not. Runs until cancelled."""
        while True:
            try:
                async with asyncio.timeout(_CONFIRM_EVERY_S):
                    await self._changed.wait()
            except TimeoutError:
                is_current = self._is_complete and not any(watch.failing_since for watch in self.watches)
                if is_current and not await asyncio.to_thread(self._attempt, None):
                    self._changed.set()
                continue
            self._changed.clear()
            if not await asyncio.to_thread(self._attempt, list(self._objects.items())):
                self._changed.set()  # written later; until then the file is not confirmed
            await asyncio.sleep(_WRITE_EVERY_S)

    def _attempt(self, objects: list[tuple[ObjectKey, api.KubernetesObject]] | None) -> bool:
        """Write *objects*, or if None, confirm what is written. Return False if that fails, which is logged once."""
        try:
            if objects is None:
                os.utime(self._settings.file)
            else:
                self._write([item for _, item in objects])
        except OSError as error:
            failure = error.strerror or str(error)
            if failure != self._failure:
                log.warning("%s cannot be written: %s", self._settings.file, failure)
            self._failure = failure
        else:
            self._failure = ""
        return not self._failure

    def _write(self, objects: Sequence[api.KubernetesObject]) -> None:
        state = _SavedState(
            _VERSION,
            self._settings.origin,
            self._settings.boot_id,
            [self._kept(item) for item in objects if isinstance(item, api.Service)],
            [self._kept(item) for item in objects if isinstance(item, api.EndpointSlice)],
            [self._kept(item) for item in objects if isinstance(item, api.Node)],
        )
        content = msgspec.msgpack.encode(state)
        replace_file(self._settings.file, hashlib.blake2b(content, digest_size=_DIGEST_BYTES).digest() + content)

    def _kept(self, item: T) -> T:
        """Return *item* with our annotations only."""
        if not item.metadata.annotations:
            return item
        prefix = self._settings.annotation_prefix
        kept = {name: text for name, text in item.metadata.annotations.items() if name.startswith(prefix)}
        return msgspec.structs.replace(item, metadata=msgspec.structs.replace(item.metadata, annotations=kept))
