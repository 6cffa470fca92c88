"""Reports Events on objects to the cluster (events.k8s.io/v1) and to the log.

The caller never waits and never fails. Events are sent in the background, once and at a limited rate. An Event that the
API server rejects is lost.
"""

import asyncio
import logging
import random
import socket
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from userspace_proxy.model.names import NamespacedName, ObjectReference
from userspace_proxy.sources.backoff import Backoff, FollowError

CONTROLLER = "userspace-proxy"
_ACTION = "Proxy"
_WAITING_MAX = 100
_KNOWN_MAX = 1_000
# An Event that is repeated within this time is only counted.
_QUIET_S = 300.0
# As in client-go: a burst, then a low rate. Ten thousand bad Services on a thousand nodes would overload the API
# server.
_BURST = 25
_REFILL_S = 10.0
_TRIES = 8
_RETRY_FIRST_S = 1.0
_RETRY_MAX_S = 30.0
# The API server's limits.
_NOTE_MAX_BYTES = 1_024
_INSTANCE_MAX = 128
_NAME_MAX = 253

Write = Callable[[str, str, Mapping[str, object]], Awaitable[int]]

log = logging.getLogger(__name__)


class _Event(NamedTuple):
    type: str
    regarding: ObjectReference
    reason: str
    note: str


@dataclass(slots=True)
class _Record:
    """How often an Event was reported; ``name`` is the name of its API object, "" before there is one."""

    count: int = 0
    at: float = float("-inf")
    name: str = ""


class EventRecorder:
    """Records Events and logs them. *write*, if given, sends a method, a path and a body to the API server."""

    def __init__(
        self,
        write: Write | None = None,
        node_name: str = "",
        *,
        now: Callable[[], float] = time.monotonic,
        retry_first_s: float = _RETRY_FIRST_S,
    ) -> None:
        self._write = write
        self._retry_first_s = retry_first_s
        self._instance = f"{CONTROLLER}-{node_name or socket.gethostname()}"[:_INSTANCE_MAX]
        self._now = now
        self._records: OrderedDict[_Event, _Record] = OrderedDict()
        self._waiting: asyncio.Queue[_Event] = asyncio.Queue(_WAITING_MAX)
        self.lost = 0

    def normal(self, regarding: ObjectReference, reason: str, note: str) -> None:
        if self._queue(_Event("Normal", regarding, reason, note)):
            log.info("%s: %s: %s", regarding, reason, note)

    def warn(self, regarding: ObjectReference, reason: str, note: str, *, is_logged: bool = False) -> None:
        if self._queue(_Event("Warning", regarding, reason, note)) and not is_logged:
            log.warning("%s: %s: %s", regarding, reason, note)

    def _queue(self, event: _Event) -> bool:
        """Queue *event*; return False if it was reported a short time ago."""
        record = self._records.setdefault(event, _Record())
        self._records.move_to_end(event)
        while len(self._records) > _KNOWN_MAX:
            self._records.popitem(last=False)
        record.count += 1
        if self._now() - record.at < _QUIET_S:
            return False
        record.at = self._now()
        if self._write is not None:
            try:
                self._waiting.put_nowait(event)
            except asyncio.QueueFull:
                self.lost += 1
        return True

    async def run(self) -> None:
        """Send queued Events to the API server, until cancelled."""
        if self._write is None:
            return
        tokens, filled_at = float(_BURST), self._now()
        while True:
            event = await self._waiting.get()
            tokens = min(_BURST, tokens + (self._now() - filled_at) / _REFILL_S)
            filled_at = self._now()
            if tokens < 1:
                await asyncio.sleep((1 - tokens) * _REFILL_S)
            tokens -= 1
            if not await self._send(self._write, event):
                self.lost += 1

    async def _send(self, write: Write, event: _Event) -> bool:
        record = self._records.get(event) or _Record(count=1)
        backoff = Backoff(self._retry_first_s, random.Random())  # noqa: S311 - jitter
        why = ""
        for _ in range(_TRIES):
            try:
                status = await self._send_once(write, event, record)
            except Exception as error:  # noqa: BLE001 - plugins of a kubeconfig raise anything
                status, why = 0, str(error) or type(error).__name__
            else:
                why = f"status {status}"
            if 200 <= status < 300:
                return True
            if 400 <= status < 500 and status not in (401, 429):
                break
            await asyncio.sleep(backoff.delay_s(FollowError(why, _RETRY_MAX_S)))
        log.log(logging.DEBUG if self.lost else logging.WARNING, "Events are lost, only the log has them: %s", why)
        return False

    async def _send_once(self, write: Write, event: _Event, record: _Record) -> int:
        namespace = event.regarding.name.namespace or "default"
        path = f"/apis/events.k8s.io/v1/namespaces/{namespace}/events"
        if record.name:
            series = {"series": {"count": record.count, "lastObservedTime": _timestamp()}}
            status = await write("PATCH", f"{path}/{record.name}", series)
            if status != 404:
                return status
        name = f"{event.regarding.name.name[: _NAME_MAX - 17]}.{time.time_ns():x}"
        status = await write("POST", path, _body(event, NamespacedName(namespace, name), self._instance))
        if 200 <= status < 300:
            record.name = name
        return status


def _body(event: _Event, name: NamespacedName, instance: str) -> dict[str, object]:
    regarding = {"apiVersion": "v1", "kind": event.regarding.kind, "name": event.regarding.name.name}
    if event.regarding.name.namespace:
        regarding["namespace"] = event.regarding.name.namespace
    if event.regarding.uid:
        regarding["uid"] = event.regarding.uid
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"namespace": name.namespace, "name": name.name},
        "eventTime": _timestamp(),
        "type": event.type,
        "reason": event.reason,
        "action": _ACTION,
        "note": event.note.encode()[:_NOTE_MAX_BYTES].decode(errors="ignore"),
        "regarding": regarding,
        "reportingController": CONTROLLER,
        "reportingInstance": instance,
    }


def _timestamp() -> str:
    """Return the current time in the API's format, which always has microseconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def node_reference(name: str) -> ObjectReference:
    """Return a reference to the Node *name*, with its name as uid, as kubelet and kube-proxy do."""
    return ObjectReference("Node", NamespacedName("", name), name)
