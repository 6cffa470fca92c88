"""Follows one kind of the Kubernetes API: list, watch, and again, for ever. No client library is known here.

What was told changes only by what the API says: silence, a broken answer or a late one leaves it as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import msgspec

from userspace_proxy.interfaces import WatchStats
from userspace_proxy.model.names import NamespacedName
from userspace_proxy.sources.api_messages import EVENT, ITEM, LIST, STATUS, Meta, Status, WatchEvent, name_and_version
from userspace_proxy.sources.backoff import Backoff, FollowError
from userspace_proxy.sources.stream import LineSplitter
from userspace_proxy.sources.transport import Response, Transport
from userspace_proxy.sources.versions import Versions

T = TypeVar("T")

# An object has 1.5 MiB at most in etcd, and JSON writes it longer.
_LINE_MAX_BYTES = 16 << 20
_PAGE_OBJECTS = 500
_REASON_MAX_BYTES = 64 << 10
_INITIAL_EVENTS_END = "k8s.io/initial-events-end"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pace:
    """How long things may take, in seconds; client-go's values where it has them."""

    # An API server says something at least once a minute (a bookmark).
    silence_s: float = 90.0
    # Until an answer begins, and between the parts of a list.
    answer_s: float = 30.0
    # After so long the server is asked to end a watch, so that nodes spread over API servers; each watch has its own.
    watch_s: tuple[int, int] = (300, 600)
    # A watch that stood so long was a good one.
    good_s: float = 5.0
    # The first retry comes after half of this, or a little more; then twice as late each time, up to ...
    retry_s: float = 0.8
    refused_max_s: float = 30.0  # ... where the server says no
    unreachable_max_s: float = 4.0  # ... where nobody answers: knocking costs nobody much, and being late costs us
    cut_max_s: float = 2.0  # ... where an answer began and was cut off
    # An orderly end is followed by the next watch within this.
    again_s: float = 0.2


class Change(NamedTuple, Generic[T]):
    """The latest of one object; None when it is gone."""

    name: NamespacedName
    object: T | None


class _Page(NamedTuple):
    """What a page of a list says of the list: at which version it is, and where it goes on; "" at its end."""

    version: int
    more: str


class _ExpiredError(FollowError):
    """The version asked for is not, or not yet, in the server's history."""


class _NoWatchListError(FollowError):
    """The server does not tell what is there by a watch (before Kubernetes 1.32, or switched off)."""


class _UnknownFieldError(FollowError):
    """The server cannot choose objects by that field."""


class _SilenceError(FollowError):
    """The connection stands and nothing comes. A new one is no proof that this is over, a word is."""


@dataclass(slots=True)
class _Found(Generic[T]):
    """What a list, or a watch that begins with one, has shown so far."""

    versions: dict[NamespacedName, int] = field(default_factory=dict)  # also of what was deleted meanwhile
    objects: dict[NamespacedName, T] = field(default_factory=dict)
    deleted: set[NamespacedName] = field(default_factory=set)

    def sees(self, name: NamespacedName, version: int) -> bool:
        """Note a version of *name*; return whether it is later than what was seen of it."""
        if version <= self.versions.get(name, -1):
            return False
        self.versions[name] = version
        self.deleted.discard(name)
        return True

    def present(self) -> dict[NamespacedName, int]:
        return {name: version for name, version in self.versions.items() if name not in self.deleted}


class Reflector(Generic[T]):
    """Yields what there is of one kind, then each change, whatever happens to the connection.

    *spares* are parameters that keep away what nobody needs. A server that does not know them is asked without.
    *is_optional*: a server may refuse it without a warning.
    """

    def __init__(
        self,
        kind: str,
        path: str,
        params: Mapping[str, str],
        decoder: msgspec.json.Decoder[T],
        transport: Transport,
        *,
        pace: Pace,
        chance: random.Random,
        spares: Mapping[str, str] | None = None,
        is_optional: bool = False,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._path = path
        self._params = params
        self._spares = dict(spares or {})
        self._failure_level = logging.DEBUG if is_optional else logging.WARNING
        self._decoder = decoder
        self._transport = transport
        self._pace = pace
        self._chance = chance
        self._now = now
        self._sleep = sleep
        self._backoff = Backoff(pace.retry_s, chance)
        self._told = Versions()
        self._version: int | None = None  # to watch on from; None: all must be listed
        self._found: _Found[T] | None = None  # while all is listed
        self._lists_next = False  # by LIST, because a watch did not do it
        self._is_silent = False
        self._asks_version = False  # before it watches on: the server may be another one, or have another past
        self.stats = WatchStats(kind)
        self.problems: dict[NamespacedName, str] = {}

    async def changes(self) -> AsyncGenerator[list[Change[T]]]:
        """Yield changes for ever; the first batch is all that is there, and may be empty."""
        self._told.forget()
        self._version, self._asks_version = None, False
        while True:
            began_at = self._now()
            failure = None
            try:
                async with contextlib.aclosing(self._follow()) as batches:
                    async for batch in batches:
                        yield batch
            except FollowError as error:
                failure = error
            if self._now() - began_at >= self._pace.good_s:
                self._backoff.reset()
            elif failure is None:
                failure = FollowError("a watch ended as soon as it had begun", self._pace.cut_max_s)
            self.stats.restarts += 1
            self._asks_version = failure is not None
            if failure is None:
                await self._sleep(self._chance.uniform(0.0, self._pace.again_s))
            else:
                delay_s = self._backoff.delay_s(failure)
                self._note(failure, is_serious=delay_s > 0)
                await self._sleep(delay_s)

    def _note(self, failure: FollowError, *, is_serious: bool) -> None:
        if isinstance(failure, _ExpiredError):
            self._version = None
            self.stats.expired += 1
        elif isinstance(failure, _UnknownFieldError):
            self._spares.clear()
        self._lists_next = isinstance(failure, _NoWatchListError)
        self._is_silent = isinstance(failure, _SilenceError)
        stats, why = self.stats, str(failure)
        if not is_serious:
            log.info("%s: %s", stats.kind, why)
            return
        if why != stats.why:
            log.log(self._failure_level, "%s cannot be followed, what is known stays: %s", stats.kind, why)
        if stats.failing_since is None:
            stats.failing_since = stats.heard_at if self._is_silent and stats.heard_at else self._now()
        stats.why = why

    def _note_well(self) -> None:
        if self.stats.failing_since is not None:
            log.info("%s are followed again", self.stats.kind)
        self.stats.failing_since, self.stats.why = None, ""

    def _note_word(self) -> None:
        self.stats.heard_at = self._now()
        self._is_silent = False
        self._note_well()

    # ---- one watch

    async def _follow(self) -> AsyncGenerator[list[Change[T]]]:
        """Yield what one watch says until it ends; where all must be listed, that first.

        Raises:
            FollowError: it cannot go on.
        """
        if self._version is None and self._lists_next:
            yield await self._list()
        elif self._version is not None and self._asks_version:
            await self._check_version(self._version)
        self._found = None if self._version is not None else _Found()
        splitter = LineSplitter(_LINE_MAX_BYTES)
        async with self._answer(self._watch_params()) as response:
            stands = asyncio.get_running_loop().call_later(self._pace.good_s, self._stands)
            try:
                async for chunk in self._chunks(response):
                    was_listing = self._found is not None
                    changes: list[Change[T]] = []
                    failure = None
                    try:
                        for line in splitter.lines(chunk):
                            self._read(line, changes)
                            self._note_word()
                    except (msgspec.MsgspecError, ValueError) as error:
                        failure = FollowError(
                            f"what the server sends makes no sense: {error}", self._pace.refused_max_s
                        )
                    except FollowError as error:
                        failure = error
                    if changes or (was_listing and self._found is None):
                        yield changes
                    if failure is not None:  # what came before it counts
                        raise failure
            except _SilenceError as silence:
                if self._found is None:
                    raise
                raise _NoWatchListError(str(silence), self._pace.cut_max_s) from None
            finally:
                stands.cancel()
        if self._found is not None:
            raise _NoWatchListError("a watch ended before it had told what is there", self._pace.cut_max_s)

    def _stands(self) -> None:
        if not self._is_silent:
            self._note_well()

    def _watch_params(self) -> dict[str, str]:
        params = {
            **self._params,
            **self._spares,
            "watch": "1",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(self._chance.randint(*self._pace.watch_s)),
        }
        if self._version is None:
            return params | {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
        return params | {"resourceVersion": str(self._version)}

    def _read(self, line: bytes, changes: list[Change[T]]) -> None:
        """Take one event: into what was found while all is listed, else into *changes*."""
        event = EVENT.decode(line)
        match event.type:
            case "ADDED" | "MODIFIED" | "DELETED":
                self.stats.events += 1
                name, version = name_and_version(event.object)
                if self._found is None:
                    self._change(event, name, version, changes)
                else:
                    self._find(self._found, name, version, event.object)
                    if event.type == "DELETED" and version >= self._found.versions[name]:
                        self._found.deleted.add(name)
            case "BOOKMARK":
                self._bookmark(ITEM.decode(event.object).metadata, changes)
            case "ERROR":
                status = STATUS.decode(event.object)
                raise self._refusal(status.code or 500, status, {})

    def _change(self, event: WatchEvent, name: NamespacedName, version: int, changes: list[Change[T]]) -> None:
        if event.type == "DELETED":
            self.problems.pop(name, None)
            if self._told.deletes(name, version):
                changes.append(Change(name, None))
        elif self._told.sets(name, version):
            made = self._decode(name, event.object)
            if made is not None:
                changes.append(Change(name, made))
        self._version = max(version, self._version or 0)

    def _bookmark(self, meta: Meta, changes: list[Change[T]]) -> None:
        version = int(meta.resource_version)
        if self._found is not None:
            if (meta.annotations or {}).get(_INITIAL_EVENTS_END) == "true":
                changes += self._replace(self._found, version)
                self._found = None
            return
        if version < (self._version or 0):
            raise _ExpiredError("the server's history is older than what it told before", self._pace.refused_max_s)
        self._told.covers(version)
        self._version = version

    async def _check_version(self, version: int) -> None:
        """Ask which version the server is at: one that watches from a later one is told nothing, and no error either.

        That is so where etcd was restored from a backup (seen with Kubernetes 1.20 and 1.36).

        Raises:
            FollowError: it is at an older one, or could not be asked.
        """
        try:
            async with asyncio.timeout(self._pace.answer_s):
                page = await self._page({**self._params, **self._spares, "limit": "1"}, None)
        except TimeoutError:
            raise FollowError("the server does not answer", self._pace.unreachable_max_s) from None
        if page.version < version:
            raise _ExpiredError(
                "the server's history is older than what it told before", self._pace.refused_max_s, at_once=True
            )

    # ---- one list

    async def _list(self) -> list[Change[T]]:
        """Return what differs between what was told and what is there.

        Raises:
            FollowError: it could not be listed.
        """
        try:
            return await self._list_by(_PAGE_OBJECTS)
        except _ExpiredError:  # while we read its pages
            return await self._list_by(0)
        except _UnknownFieldError:
            self._spares.clear()
            return await self._list()

    async def _list_by(self, page_objects: int) -> list[Change[T]]:
        found = self._found = _Found()
        params = {**self._params, **self._spares} | ({"limit": str(page_objects)} if page_objects else {})
        while True:
            version, more = await self._page(params, found)
            self._note_word()
            if not more:
                return self._replace(found, version)
            params["continue"] = more

    async def _page(self, params: Mapping[str, str], found: _Found[T] | None) -> _Page:
        """Read one page of a list into *found*.

        Raises:
            FollowError: it could not be read.
        """
        body = bytearray()
        async with self._answer(params) as response:
            async for chunk in self._chunks(response):
                body += chunk
        try:
            page = LIST.decode(body)
            if found is not None:
                for item in page.items or ():
                    self._find(found, *name_and_version(item), item)
            return _Page(int(page.metadata.resource_version), page.metadata.continue_ or "")
        except (msgspec.MsgspecError, ValueError) as error:
            raise FollowError(f"what the server sends makes no sense: {error}", self._pace.refused_max_s) from None

    def _find(self, found: _Found[T], name: NamespacedName, version: int, raw: msgspec.Raw) -> None:
        if found.sees(name, version) and (made := self._decode(name, raw)) is not None:
            found.objects[name] = made

    def _replace(self, found: _Found[T], version: int) -> list[Change[T]]:
        present = found.present()
        news, gone = self._told.replace(present, version)
        self._version = version
        self.stats.relists += 1
        self.problems = {name: said for name, said in self.problems.items() if name in present}
        changes = [Change(name, found.objects[name]) for name in news if name in found.objects]
        return [*changes, *(Change[T](name, None) for name in gone)]

    def _decode(self, name: NamespacedName, raw: msgspec.Raw) -> T | None:
        """Return the object; None where it makes no sense, and then its last good version stays."""
        try:
            made = self._decoder.decode(raw)
        except msgspec.MsgspecError as error:
            said = f"{self.stats.kind} {name}: {error}"
            if self.problems.get(name) != said:
                log.error("%s; its last good version, if there was one, goes on serving", said)  # noqa: TRY400
            self.problems[name] = said
            return None
        self.problems.pop(name, None)
        return made

    # ---- one answer

    @contextlib.asynccontextmanager
    async def _answer(self, params: Mapping[str, str]) -> AsyncGenerator[Response]:
        """Ask, and yield the answer if it is a good one.

        Raises:
            FollowError: it is none.
        """
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(self._pace.answer_s):
                    response = await stack.enter_async_context(self._transport.get(self._path, params))
            except TimeoutError:
                raise FollowError("the server does not answer", self._pace.unreachable_max_s) from None
            except OSError as error:
                raise FollowError(f"the server cannot be reached: {error}", self._pace.unreachable_max_s) from None
            if response.status != 200:
                raise self._refusal(response.status, await self._status(response), response.headers)
            yield response

    async def _status(self, response: Response) -> Status:
        """Return what the server says of its refusal, as far as that can be read."""
        body = bytearray()
        with contextlib.suppress(FollowError):
            async for chunk in self._chunks(response):
                body += chunk
                if len(body) > _REASON_MAX_BYTES:
                    break
        try:
            return STATUS.decode(body)
        except msgspec.MsgspecError:
            return Status()

    def _refusal(self, code: int, status: Status, headers: Mapping[str, str]) -> FollowError:
        said = f"{code} {status.message}" if status.message else f"the server answers {code}"
        longest_s = self._pace.refused_max_s
        causes = (status.details.causes if status.details else None) or ()
        if code == 410 or any(cause.reason == "ResourceVersionTooLarge" for cause in causes):
            return _ExpiredError(said, longest_s, at_once=True)
        if code == 400 and self._spares and (self._found is None or self._lists_next):
            return _UnknownFieldError(said, longest_s, at_once=True)
        if self._found is not None and code in (400, 422):
            return _NoWatchListError(said, longest_s, at_once=True)
        retry_after = headers.get("Retry-After", "")
        retry_after_s = min(float(retry_after), longest_s) if retry_after.isdecimal() else 0.0
        return FollowError(said, longest_s, retry_after_s=retry_after_s, at_once=code == 401)

    async def _chunks(self, response: Response) -> AsyncGenerator[bytes]:
        """Yield the body as it comes.

        Raises:
            FollowError: it was cut off, or nothing came for too long.
        """
        chunks = response.chunks()
        while True:
            within_s = self._pace.silence_s if self._found is None else self._pace.answer_s
            try:
                async with asyncio.timeout(within_s):
                    chunk = await anext(chunks, b"")
            except TimeoutError:
                raise _SilenceError(f"nothing was heard for {within_s:g} s", self._pace.cut_max_s) from None
            except OSError as error:
                raise FollowError(f"the connection was cut: {error}", self._pace.cut_max_s) from None
            if not chunk:
                return
            yield chunk
