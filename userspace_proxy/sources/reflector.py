"""Follows one kind of the Kubernetes API: list and watch, repeatedly. Independent of the client library.

Only an answer of the API changes the known objects. Silence, a broken answer or a late one leaves them unchanged.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Generic, NamedTuple, TypeVar

import msgspec

from userspace_proxy.model.names import NamespacedName
from userspace_proxy.model.watch_stats import WatchStats
from userspace_proxy.sources.api_messages import EVENT, ITEM, LIST, STATUS, Meta, Status, WatchEvent, name_and_version
from userspace_proxy.sources.backoff import Backoff, FollowError
from userspace_proxy.sources.stream import LineSplitter
from userspace_proxy.sources.transport import Response, Transport
from userspace_proxy.sources.versions import Versions

T = TypeVar("T")

# etcd limits an object to 1.5 MiB; its JSON form is longer.
_LINE_MAX_BYTES = 16 << 20
_PAGE_OBJECTS = 500
_REASON_MAX_BYTES = 64 << 10
_RETRY_AFTER_MAX_S = 300.0
_INITIAL_EVENTS_END = "k8s.io/initial-events-end"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pace:
    """Time limits and delays in seconds; client-go's values where it has them."""

    # An API server sends a bookmark at least once a minute.
    silence_s: float = 90.0
    # Maximum time until an answer begins, and between the parts of a list.
    answer_s: float = 30.0
    # Range for the requested duration of a watch. Random, so that nodes spread over the API servers.
    watch_s: tuple[int, int] = (300, 600)
    # A watch that lasts this long counts as a success.
    good_s: float = 5.0
    # The first retry follows after 0.5 to 1 times this delay. The delay doubles up to a maximum, which depends on the
    # failure:
    retry_s: float = 0.8
    refused_max_s: float = 30.0  # the server rejects the request
    unreachable_max_s: float = 4.0  # no answer: retries are cheap, and late news is costly
    cut_max_s: float = 2.0  # the connection broke during an answer
    # The maximum delay before the next watch after a regular end.
    again_s: float = 0.2


class Change(NamedTuple, Generic[T]):
    """The latest version of one object, or None if it was deleted."""

    name: NamespacedName
    object: T | None


class _Page(NamedTuple):
    """The list version of a page, and the token for the next page ("" on the last)."""

    version: int
    more: str


class _ExpiredError(FollowError):
    """The server's history does not contain the requested version (any more, or yet)."""


class _NoWatchListError(FollowError):
    """The server cannot stream the initial list in a watch (before Kubernetes 1.32, or disabled)."""


class _UnknownFieldError(FollowError):
    """The server does not support that field selector."""


class _CutError(FollowError):
    """The connection broke during an answer."""


class _SilenceError(FollowError):
    """The connection is open but silent.

    A message ends this state, or an accepted watch that lasts and is then cut. A new connection alone does not.
    """


@dataclass(slots=True)
class _Found(Generic[T]):
    """The objects found so far by a list, or by a watch that begins with one."""

    versions: dict[NamespacedName, int] = field(default_factory=dict)  # including objects deleted meanwhile
    objects: dict[NamespacedName, T] = field(default_factory=dict)
    deleted: set[NamespacedName] = field(default_factory=set)

    def sees(self, name: NamespacedName, version: int) -> bool:
        """Record *version* of *name*; return whether it is newer than the known one."""
        if version <= self.versions.get(name, -1):
            return False
        self.versions[name] = version
        self.deleted.discard(name)
        return True

    def present(self) -> dict[NamespacedName, int]:
        return {name: version for name, version in self.versions.items() if name not in self.deleted}


class Reflector(Generic[T]):
    """Yields all objects of one kind, then each change, and recovers from every connection failure.

    *filters*: parameters that exclude unneeded objects. If the server does not know them, requests omit them.
    *is_optional*: failures are logged at DEBUG level.
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
        filters: Mapping[str, str] | None = None,
        is_optional: bool = False,
        now: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._path = path
        self._params = params
        self._filters = dict(filters or {})
        self._failure_level = logging.DEBUG if is_optional else logging.WARNING
        self._decoder = decoder
        self._transport = transport
        self._pace = pace
        self._chance = chance
        self._now = now
        self._sleep = sleep
        self._backoff = Backoff(pace.retry_s, chance)
        self._reported = Versions()
        self._version: int | None = None  # to continue watching from; None: list everything first
        self._found: _Found[T] | None = None  # during a list
        self._lists_next = False  # with LIST, because the watch failed to do it
        self._stands_since = inf  # when the server accepted the current watch
        self._is_silent = False
        self._asks_version = False  # check it before watching: the server or its history may have changed
        self.stats = WatchStats(kind)
        self.problems: dict[NamespacedName, str] = {}

    async def changes(self) -> AsyncGenerator[list[Change[T]]]:
        """Yield batches of changes, without end; the first holds all objects and may be empty."""
        self._reported.forget()
        self._version, self._asks_version = None, False
        while True:
            self._stands_since = inf
            failure = None
            try:
                async with contextlib.aclosing(self._follow()) as batches:
                    async for batch in batches:
                        yield batch
            except FollowError as error:
                failure = error
            has_stood = self._now() - self._stands_since >= self._pace.good_s
            if has_stood:
                self._backoff.reset()
            elif failure is None:
                failure = FollowError("a watch ended as soon as it had begun", self._pace.cut_max_s)
            self.stats.restarts += 1
            self._asks_version = failure is not None
            if failure is None:
                await self._sleep(self._chance.uniform(0.0, self._pace.again_s))
            else:
                delay_s = self._backoff.delay_s(failure)
                if has_stood and self._found is None and isinstance(failure, _CutError):
                    # A balancer before the server ends a watch without events like this. It is a failure if the next
                    # watch fails, too, or if the initial list was not complete.
                    log.debug("%s: %s", self.stats.kind, failure)
                    self._is_silent = False  # the server has accepted this watch since the silence
                else:
                    self._note(failure, is_delayed=delay_s > 0)
                await self._sleep(delay_s)

    def _note(self, failure: FollowError, *, is_delayed: bool) -> None:
        if isinstance(failure, _ExpiredError):
            self._version = None
            self.stats.expired += 1
        elif isinstance(failure, _UnknownFieldError):
            self._filters.clear()
        self._lists_next = isinstance(failure, _NoWatchListError)
        self._is_silent = isinstance(failure, _SilenceError)
        stats, why = self.stats, str(failure)
        if not is_delayed:
            log.info("%s: %s", stats.kind, why)
            return
        if why != stats.why:
            log.log(self._failure_level, "%s cannot be followed, what is known stays: %s", stats.kind, why)
        if stats.failing_since is None:
            stats.failing_since = stats.heard_at if self._is_silent and stats.heard_at else self._now()
        stats.why = why

    def _note_success(self) -> None:
        if self.stats.failing_since is not None:
            log.info("%s are followed again", self.stats.kind)
        self.stats.failing_since, self.stats.why = None, ""

    def _note_message(self) -> None:
        self.stats.heard_at = self._now()
        self._is_silent = False
        self._note_success()

    # ---- one watch

    async def _follow(self) -> AsyncGenerator[list[Change[T]]]:
        """Yield the changes of one watch until it ends, and the initial list first if needed.

        Raises:
            FollowError: the watch failed.
        """
        if self._version is None and self._lists_next:
            yield await self._list()
        elif self._version is not None and self._asks_version:
            await self._check_version(self._version)
        self._found = None if self._version is not None else _Found()
        splitter = LineSplitter(_LINE_MAX_BYTES)
        async with self._answer(self._watch_params()) as response:
            self._stands_since = self._now()
            stands = asyncio.get_running_loop().call_later(self._pace.good_s, self._note_lasting)
            try:
                async for chunk in self._chunks(response):
                    was_listing = self._found is not None
                    changes: list[Change[T]] = []
                    failure = self._read_lines(splitter.lines(chunk), changes)
                    if changes or (was_listing and self._found is None):
                        yield changes
                    if failure is not None:  # changes before the failure are valid
                        raise failure
            except _SilenceError as silence:
                if self._found is None:
                    raise
                raise _NoWatchListError(str(silence), self._pace.cut_max_s) from None
            finally:
                stands.cancel()
        if self._found is not None:
            raise _NoWatchListError("a watch ended before it had told what is there", self._pace.cut_max_s)

    def _note_lasting(self) -> None:
        if not self._is_silent:
            self._note_success()

    def _watch_params(self) -> dict[str, str]:
        params = {
            **self._params,
            **self._filters,
            "watch": "1",
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(self._chance.randint(*self._pace.watch_s)),
        }
        if self._version is None:
            return params | {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
        return params | {"resourceVersion": str(self._version)}

    def _read_lines(self, lines: Iterable[bytes], changes: list[Change[T]]) -> FollowError | None:
        """Apply the events in *lines*; return why the watch failed at one of them."""
        try:
            for line in lines:
                self._read(line, changes)
                self._note_message()
        except (msgspec.MsgspecError, ValueError) as error:
            return FollowError(f"the server sent an invalid answer: {error}", self._pace.refused_max_s)
        except FollowError as error:
            return error
        return None

    def _read(self, line: bytes, changes: list[Change[T]]) -> None:
        """Apply one event: to the initial list while it is incomplete, else to *changes*."""
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
            if self._reported.deletes(name, version):
                changes.append(Change(name, None))
        elif self._reported.sets(name, version):
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
        self._reported.covers(version)
        self._version = version

    async def _check_version(self, version: int) -> None:
        """Check that the server's version is not older than *version*.

        A server that watches from a version in its future sends nothing, not even an error. This happens after etcd is
        restored from a backup (seen with Kubernetes 1.20 and 1.36).

        Raises:
            FollowError: its version is older, or the request failed.
        """
        try:
            async with asyncio.timeout(self._pace.answer_s):
                page = await self._page({**self._params, **self._filters, "limit": "1"}, None)
        except TimeoutError:
            raise FollowError("the server does not answer", self._pace.unreachable_max_s) from None
        if page.version < version:
            raise _ExpiredError(
                "the server's history is older than what it told before", self._pace.refused_max_s, at_once=True
            )

    # ---- one list

    async def _list(self) -> list[Change[T]]:
        """List all objects; return the changes since the last report.

        Raises:
            FollowError: the list could not be read.
        """
        try:
            return await self._list_by(_PAGE_OBJECTS)
        except _ExpiredError:  # the version expired between two pages
            return await self._list_by(0)
        except _UnknownFieldError:
            self._filters.clear()
            return await self._list()

    async def _list_by(self, page_objects: int) -> list[Change[T]]:
        found = self._found = _Found()
        params = {**self._params, **self._filters} | ({"limit": str(page_objects)} if page_objects else {})
        while True:
            version, more = await self._page(params, found)
            self._note_message()
            if not more:
                return self._replace(found, version)
            params["continue"] = more

    async def _page(self, params: Mapping[str, str], found: _Found[T] | None) -> _Page:
        """Read one page of a list into *found*.

        Raises:
            FollowError: the page could not be read.
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
            raise FollowError(f"the server sent an invalid answer: {error}", self._pace.refused_max_s) from None

    def _find(self, found: _Found[T], name: NamespacedName, version: int, raw: msgspec.Raw) -> None:
        if found.sees(name, version) and (made := self._decode(name, raw)) is not None:
            found.objects[name] = made

    def _replace(self, found: _Found[T], version: int) -> list[Change[T]]:
        present = found.present()
        news, gone = self._reported.replace(present, version)
        self._version = version
        self.stats.relists += 1
        self.problems = {name: message for name, message in self.problems.items() if name in present}
        changes = [Change(name, found.objects[name]) for name in news if name in found.objects]
        return [*changes, *(Change[T](name, None) for name in gone)]

    def _decode(self, name: NamespacedName, raw: msgspec.Raw) -> T | None:
        """Return the decoded object, or None if it is invalid; its last good version then stays in force."""
        try:
            made = self._decoder.decode(raw)
        except msgspec.MsgspecError as error:
            message = f"{self.stats.kind} {name}: {error}"
            if self.problems.get(name) != message:
                log.error("%s; its last good version, if there was one, goes on serving", message)  # noqa: TRY400
            self.problems[name] = message
            return None
        self.problems.pop(name, None)
        return made

    # ---- one answer

    @contextlib.asynccontextmanager
    async def _answer(self, params: Mapping[str, str]) -> AsyncGenerator[Response]:
        """Send a GET request and yield the answer if its status is 200.

        Raises:
            FollowError: there is no answer, or its status is an error.
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
        """Return the error details in the body of *response*, as far as they can be read."""
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
        message = f"{code} {status.message}" if status.message else f"the server answers {code}"
        longest_s = self._pace.refused_max_s
        causes = (status.details.causes if status.details else None) or ()
        if code == 410 or any(cause.reason == "ResourceVersionTooLarge" for cause in causes):
            return _ExpiredError(message, longest_s, at_once=True)
        if code == 400 and self._filters and (self._found is None or self._lists_next):
            return _UnknownFieldError(message, longest_s, at_once=True)
        if self._found is not None and code in (400, 422):
            return _NoWatchListError(message, longest_s, at_once=True)
        retry_after = headers.get("Retry-After", "")
        retry_after_s = min(float(retry_after), _RETRY_AFTER_MAX_S) if retry_after.isdecimal() else 0.0
        return FollowError(message, longest_s, retry_after_s=retry_after_s, at_once=code == 401)

    async def _chunks(self, response: Response) -> AsyncGenerator[bytes]:
        """Yield the chunks of the body as they arrive.

        Raises:
            FollowError: the connection broke, or was silent for too long.
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
                raise _CutError(f"the connection was cut: {error}", self._pace.cut_max_s) from None
            if not chunk:
                return
            yield chunk
