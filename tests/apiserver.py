"""An API server for tests: speaks the list and watch protocol of Kubernetes over real sockets, and can misbehave.

What is written to it is the truth that a client must come to. What it is told in `Faults` it does to whoever
watches; nothing of that changes the truth.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import json
import re
import socket
import ssl
import struct
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from aiohttp import web

Object = dict[str, Any]
Key = tuple[str, str]

SERVICES = "/api/v1/services"
SLICES = "/apis/discovery.k8s.io/v1/endpointslices"
OLD_SLICES = "/apis/discovery.k8s.io/v1beta1/endpointslices"  # of kube-proxy before 1.21
NODES = "/api/v1/nodes"
EVENTS = "/apis/events.k8s.io/v1/namespaces/{namespace}/events"
SERVICE_CIDRS = "/apis/networking.k8s.io/v1/servicecidrs"
_KINDS = {SERVICES: "Service", SLICES: "EndpointSlice", OLD_SLICES: "EndpointSlice", NODES: "Node"} | {
    SERVICE_CIDRS: "ServiceCIDR"
}


class Fault(Enum):
    """A fault of a watch, in place of its next event or together with it."""

    SILENCE = "nothing more comes, and the connection stands"
    RESET = "the connection is reset"
    HALF_LINE = "half of a line, then the connection is reset"
    END = "an orderly end"
    DUPLICATE = "the event comes twice"
    REORDER = "the event comes after the one behind it"
    BYTES = "the event comes byte by byte"
    EXPIRED = "410 as an event, in one write with the event before it"
    ERROR = "500 as an event"
    NONSENSE = "a line that is no JSON"


class _Write(NamedTuple):
    """One write: the object before and after it; None if it did not exist."""

    version: int
    key: Key
    before: Object | None
    after: Object | None


@dataclass
class _Kind:
    objects: dict[Key, Object] = field(default_factory=dict)
    history: list[_Write] = field(default_factory=list)


class Refusal(NamedTuple):
    status: int
    headers: Mapping[str, str] = {}
    message: str = "refused by the test"


class ApiServer:
    """Objects, their history, and the open watches."""

    def __init__(self) -> None:
        self.version = 1_000
        self.compacted = 0
        self.kinds = {path: _Kind() for path in _KINDS}
        self.knows_watch_list = True
        self.knows_cluster_ip_field = True  # since Kubernetes 1.31
        self.bookmark_s = 0.1
        self.token = ""  # "": everybody may ask
        self.page_objects_max = 500
        self.forbidden: set[str] = set()  # paths that nobody may ask for
        self.refusals: deque[Refusal] = deque()  # for the next requests
        self.faults: deque[Fault] = deque()  # for the next events
        self.is_frozen = False  # takes connections and says nothing
        self.events: list[Object] = []
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.watching: Counter[str] = Counter()
        self.most_watching: Counter[str] = Counter()
        self._pages: dict[str, tuple[int, list[Object]]] = {}
        self._written = asyncio.Condition()
        self._watchers: set[web.StreamResponse] = set()
        self.tls: ssl.SSLContext | None = None
        self._runner: web.AppRunner | None = None
        self._address = ("127.0.0.1", 0)

    # ---- running

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self._address[0]}:{self._address[1]}"

    async def start(self, sock: socket.socket | None = None) -> None:
        """Serve at *sock*, or at the address it had before, or at a free one."""
        app = web.Application()
        for path in _KINDS:
            app.router.add_get(path, self._get)
            group, _, plural = path.rpartition("/")
            app.router.add_get(f"{group}/namespaces/{{namespace}}/{plural}", self._get)
        app.router.add_get(NODES + "/{name}", self._get_node)
        app.router.add_post(EVENTS, self._create_event)
        app.router.add_patch(EVENTS + "/{name}", self._patch_event)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        if sock is None:
            sock = socket.create_server(self._address)
        self._address = sock.getsockname()[:2]
        await web.SockSite(self._runner, sock, ssl_context=self.tls).start()

    async def stop(self) -> None:
        """End as a process that is killed."""
        self.cut()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def cut(self) -> None:
        """Reset the connection of every watcher."""
        for response in self._watchers:
            _reset(response)

    # ---- writing

    async def put(self, path: str, given: Object) -> None:
        """Create or replace an object; *given* needs no more than a name."""
        after = copy.deepcopy(given)
        key = _key(after)
        before = self.kinds[path].objects.get(key)
        self.version += 1
        after["metadata"]["resourceVersion"] = str(self.version)
        self.kinds[path].objects[key] = after
        await self._note(path, _Write(self.version, key, before, after))

    async def delete(self, path: str, name: str, namespace: str = "default") -> None:
        key = (namespace, name)
        before = self.kinds[path].objects.pop(key)
        self.version += 1
        await self._note(path, _Write(self.version, key, before, None))

    async def delete_unseen(self, path: str, name: str, namespace: str = "default") -> None:
        """Delete an object and compact its deletion away, so that no watch can report it."""
        await self.delete(path, name, namespace)
        self.compact()

    def compact(self) -> None:
        """Forget the history so far: open watches continue, and a watch from an older version gets 410."""
        self.compacted = self.version
        self._pages.clear()

    async def _note(self, path: str, write: _Write) -> None:
        self.kinds[path].history.append(write)
        async with self._written:
            self._written.notify_all()

    # ---- Events

    async def _create_event(self, request: web.Request) -> web.Response:
        if (refused := await self._refused(request)) is not None:
            return refused
        event = await request.json()
        if wrong := _wrong_in_event(event, request.match_info["namespace"]):
            return _status(Refusal(422, message=wrong))
        if any(event["metadata"]["name"] == known["metadata"]["name"] for known in self.events):
            return _status(Refusal(409, message="it exists"))
        self.events.append(event)
        return web.json_response(event, status=201)

    async def _patch_event(self, request: web.Request) -> web.Response:
        if (refused := await self._refused(request)) is not None:
            return refused
        if request.content_type not in ("application/merge-patch+json", "application/strategic-merge-patch+json"):
            return _status(Refusal(415, message="unsupported patch"))
        for event in self.events:
            if event["metadata"]["name"] == request.match_info["name"]:
                event.update(await request.json())
                return web.json_response(event)
        return _status(Refusal(404, message="it is gone"))

    # ---- answering

    async def _refused(self, request: web.Request) -> web.Response | None:
        """Note the request; return how it is refused, if it is."""
        self.requests.append((request.path, dict(request.query)))
        if self.is_frozen:
            await asyncio.Event().wait()
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return _status(Refusal(401, message="Unauthorized"))
        if request.path in self.forbidden:
            return _status(Refusal(403, message="not for you"))
        if self.refusals:
            return _status(self.refusals.popleft())
        return None

    async def _get(self, request: web.Request) -> web.StreamResponse:
        if (refused := await self._refused(request)) is not None:
            return refused
        params = dict(request.query)
        begins_with_list = params.get("sendInitialEvents") == "true"
        if begins_with_list and not self.knows_watch_list:
            return _status(Refusal(422, message="sendInitialEvents: Forbidden"))
        if "spec.clusterIP" in params.get("fieldSelector", "") and not self.knows_cluster_ip_field:
            return _status(Refusal(400, message="field label not supported: spec.clusterIP"))
        namespace = request.match_info.get("namespace", "")
        selects = _selector(params, namespace)
        path = request.path.replace(f"/namespaces/{namespace}/", "/")
        if "watch" in params:
            return await self._watch(request, path, params, selects)
        return self._list(path, params, selects)

    async def _get_node(self, request: web.Request) -> web.Response:
        if (refused := await self._refused(request)) is not None:
            return refused
        found = self.kinds[NODES].objects.get(("", request.match_info["name"]))
        return web.json_response(found) if found else _status(Refusal(404, message="no such node"))

    def _list(self, path: str, params: dict[str, str], selects: Callable[[Object], bool]) -> web.Response:
        token = params.get("continue", "")
        if token:
            if token not in self._pages:
                return _status(Refusal(410, message="the continue token is too old"))
            version, left = self._pages.pop(token)
        else:
            version, left = self.version, [o for o in self.kinds[path].objects.values() if selects(o)]
        limit = min(int(params.get("limit", 0)), self.page_objects_max) or len(left)
        page, left = left[:limit], left[limit:]
        metadata: Object = {"resourceVersion": str(version)}
        if left:
            metadata["continue"] = base64.b64encode(f"{path}/{version}/{len(left)}".encode()).decode()
            self._pages[metadata["continue"]] = (version, left)
        listed = {"apiVersion": _api_version(path), "kind": f"{_KINDS[path]}List", "metadata": metadata}
        return web.json_response({**listed, "items": page or None})

    async def _watch(
        self, request: web.Request, path: str, params: dict[str, str], selects: Callable[[Object], bool]
    ) -> web.StreamResponse:
        begins_with_list = params.get("sendInitialEvents") == "true"
        version = int(params.get("resourceVersion") or 0)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        self.watching[path] += 1
        self.most_watching[path] = max(self.most_watching[path], self.watching[path])
        self._watchers.add(response)
        try:
            with contextlib.suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(float(params.get("timeoutSeconds", 60))):
                    if not begins_with_list and version < self.compacted:
                        await response.write(_line("ERROR", _status_object(410, "too old resource version")))
                        return response
                    await self._tell(response, path, selects, None if begins_with_list else version)
            if (transport := request.transport) is not None and not transport.is_closing():
                await response.write_eof()
        finally:
            self._watchers.discard(response)
            self.watching[path] -= 1
        return response

    async def _tell(
        self, response: web.StreamResponse, path: str, selects: Callable[[Object], bool], version: int | None
    ) -> None:
        kind = self.kinds[path]
        if version is None:
            version = self.version
            lines = [_line("ADDED", known) for known in kind.objects.values() if selects(known)]
            if not await self._send(response, lines):
                return
            await response.write(_bookmark(path, version, {"k8s.io/initial-events-end": "true"}))
        while True:
            news = [write for write in kind.history if write.version > version]
            if news:
                version = news[-1].version
                if not await self._send(response, [line for write in news for line in _event(write, selects)]):
                    return
                continue
            try:
                async with asyncio.timeout(self.bookmark_s), self._written:
                    await self._written.wait()
            except TimeoutError:
                # From a later version than ours a watch is told nothing until we are there: no event, no bookmark.
                if version <= self.version and (not kind.history or kind.history[-1].version <= version):
                    version = self.version
                    await response.write(_bookmark(path, version, {}))

    async def _send(self, response: web.StreamResponse, lines: list[bytes]) -> bool:
        """Send *lines*, each with the next fault; return whether the watch continues."""
        waiting = deque(lines)
        while waiting:
            line = waiting.popleft()
            match self.faults.popleft() if self.faults else None:
                case None:
                    await response.write(line)
                case Fault.DUPLICATE:
                    await response.write(line + line)
                case Fault.REORDER:
                    await response.write((waiting.popleft() if waiting else b"") + line)
                case Fault.BYTES:
                    for start in range(0, len(line), max(1, len(line) // 40)):
                        await response.write(line[start : start + max(1, len(line) // 40)])
                        await asyncio.sleep(0)
                case Fault.SILENCE:
                    await asyncio.Event().wait()
                case Fault.END:
                    return False
                case Fault.RESET:
                    return _reset(response)
                case Fault.HALF_LINE:
                    await response.write(line[: len(line) // 2])
                    await asyncio.sleep(0.01)
                    return _reset(response)
                case Fault.EXPIRED:
                    await response.write(line + _line("ERROR", _status_object(410, "too old resource version")))
                    return False
                case Fault.ERROR:
                    await response.write(_line("ERROR", _status_object(500, "etcd has no leader")))
                    return False
                case Fault.NONSENSE:
                    await response.write(b"<html>502</html>\n")
                    return False
        return True


# ---- words of the protocol


def _wrong_in_event(event: Object, namespace: str) -> str:
    """Return the error of the real server's validation of events.k8s.io/v1."""
    for name, longest in (("reportingController", 253), ("reportingInstance", 128), ("action", 128), ("reason", 128)):
        if not 0 < len(event.get(name) or "") <= longest:
            return f"{name}: Required value, of up to {longest} characters"
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", event.get("eventTime") or ""):
        return "eventTime: Required value"
    if event.get("type") not in ("Normal", "Warning"):
        return "type: Invalid value"
    if len((event.get("note") or "").encode()) > 1_024:
        return "note: can have at most 1024 characters"
    if event["metadata"]["namespace"] != namespace or (event["regarding"].get("namespace") or "default") != namespace:
        return "regarding.namespace: does not match event.namespace"
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?", event["metadata"]["name"]):
        return "metadata.name: Invalid value"
    return ""


def _api_version(path: str) -> str:
    return path.removeprefix("/apis/").removeprefix("/api/").rpartition("/")[0]


def _key(given: Object) -> Key:
    metadata = given["metadata"]
    return metadata.get("namespace", ""), metadata["name"]


def _line(kind: str, given: Object) -> bytes:
    return json.dumps({"type": kind, "object": given}).encode() + b"\n"


def _bookmark(path: str, version: int, annotations: Mapping[str, str]) -> bytes:
    metadata = {"resourceVersion": str(version), "annotations": annotations or None}
    return _line("BOOKMARK", {"apiVersion": _api_version(path), "kind": _KINDS[path], "metadata": metadata})


def _event(write: _Write, selects: Callable[[Object], bool]) -> Iterator[bytes]:
    """Yield the event of *write* for a watcher: a deletion if its selector no longer matches the object."""
    was = write.before is not None and selects(write.before)
    if write.after is not None and selects(write.after):
        yield _line("MODIFIED" if was else "ADDED", write.after)
    elif was:
        assert write.before is not None
        last = copy.deepcopy(write.before)
        last["metadata"]["resourceVersion"] = str(write.version)
        yield _line("DELETED", last)


def _status_object(code: int, message: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Status",
        "status": "Failure",
        "code": code,
        "message": message,
        "details": None,
    }


def _status(refusal: Refusal) -> web.Response:
    body = _status_object(refusal.status, refusal.message)
    return web.json_response(body, status=refusal.status, headers=refusal.headers)


def _reset(response: web.StreamResponse) -> bool:
    request = response._req
    if request is not None and request.transport is not None:
        sock = request.transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
    return False


def _selector(params: Mapping[str, str], namespace: str = "") -> Callable[[Object], bool]:
    """Return a function that applies the label and field selectors in *params*, as far as a proxy uses their language.

    *namespace*: "" for all.
    """
    labels = [part for part in params.get("labelSelector", "").split(",") if part]
    fields = [part for part in params.get("fieldSelector", "").split(",") if part]

    def selects(given: Object) -> bool:
        if namespace and given["metadata"].get("namespace") != namespace:
            return False
        held = given["metadata"].get("labels") or {}
        for part in labels:
            name, equal, value = part.partition("=")
            if not (held.get(name) == value if equal else name[1:] not in held):
                return False
        for part in fields:
            path, _, value = part.partition("=")
            found: Any = given
            for step in path.rstrip("!").split("."):
                found = (found or {}).get(step)
            if (found == value) is path.endswith("!"):
                return False
        return True

    return selects


# ---- running it


@contextlib.asynccontextmanager
async def api_server() -> AsyncIterator[ApiServer]:
    server = ApiServer()
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


class ApiServerThread:
    """An API server with an event loop of its own, for tests that have none."""

    def __init__(self, sock: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        import threading

        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.server = self.do(self._made(sock, tls))

    async def _made(self, sock: socket.socket, tls: ssl.SSLContext | None) -> ApiServer:
        server = ApiServer()
        server.tls = tls
        await server.start(sock)
        return server

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run *work* in the server's event loop; return its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    def close(self) -> None:
        self.do(self.server.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()
