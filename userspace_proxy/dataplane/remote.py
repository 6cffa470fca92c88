"""The DataPlane of the control process: forwards each call to one or more worker processes.

The control process opens the listeners and keeps a duplicate of each, with all state that it sent to the workers. A
worker that dies is replaced by one that serves at once at the same sockets. Only its open connections are lost, and
clients in the accept queue notice nothing. A successor of the control process gets the same.
"""

import asyncio
import contextlib
import socket
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import msgspec

from userspace_proxy.dataplane import wire
from userspace_proxy.dataplane.connections import raise_descriptor_limit
from userspace_proxy.dataplane.groups import close_group, fit_group, open_group
from userspace_proxy.dataplane.handover import Inherit
from userspace_proxy.dataplane.memory import Memories
from userspace_proxy.dataplane.process import WorkerProcess, answers_to
from userspace_proxy.dataplane.slices import in_slices
from userspace_proxy.dataplane.sockets import refusal, reserve_refusing_port
from userspace_proxy.dataplane.stats import add_up, sum_of
from userspace_proxy.errors import SyncError
from userspace_proxy.model.counters import PlaneStats
from userspace_proxy.model.details import Details, DetailsRequest, merge
from userspace_proxy.model.listeners import Backends, ListenerSpec
from userspace_proxy.model.names import ListenerName, Scope, ServicePortName

# Items per frame: packets wait at most a few milliseconds while the worker applies one.
_A_FRAME = 32
_DETAILS_A_FRAME = 256
# A worker that does not read or answer for this time is abandoned at close.
_SENT_S = 2.0


class RemotePlane:
    """Worker processes, and the state to replace them. Create it inside the running event loop, then call `start`."""

    def __init__(self, settings: wire.WorkerSettings) -> None:
        self._limits = settings.limits
        self._sockets: dict[ListenerName, list[socket.socket]] = {}  # as many as workers
        self._specs: dict[ListenerName, ListenerSpec] = {}
        self._backends: dict[ListenerName, Backends] = {}
        self._retired: list[socket.socket] = []  # perhaps in a channel still: closed when all workers have answered
        self._reserved: dict[int, tuple[socket.socket, ...]] = {}
        self._name: socket.socket | None = None
        self._waits = False  # for the predecessor to stop reading
        self._workers = [
            WorkerProcess(msgspec.structs.replace(settings, worker=index), self._serves, self._replay)
            for index in range(settings.workers)
        ]

    def start(self) -> None:
        """Start the workers; raises OSError."""
        raise_descriptor_limit()
        for worker in self._workers:
            worker.start()

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers]

    @property
    def restarts(self) -> int:
        return sum(worker.restarts for worker in self._workers)

    @property
    def failing(self) -> str:
        return "; ".join(worker.failing for worker in self._workers if worker.failing)

    @property
    def unserved(self) -> Mapping[ListenerName, str]:
        return {name: why for worker in self._workers for name, why in worker.unserved.items()}

    # ---- state that outlives a process

    handover_obstacle = ""

    async def _replay(
        self, worker: WorkerProcess, names: Collection[ListenerName] | None = None
    ) -> Mapping[ListenerName, str]:
        """Send *worker* its whole state, or that of the listeners *names*. Return those it cannot serve and why."""
        if names is None and self._name is not None:
            worker.send(wire.KeepOn(), [self._name.fileno()])
        specs = [spec for name, spec in self._specs.items() if names is None or name in names]
        sent = [worker.send(listeners, descriptors) for listeners, descriptors in self._all_of(worker, specs)]
        return _refused(await answers_to(sent))

    def _all_of(self, worker: WorkerProcess, specs: Sequence[ListenerSpec]) -> Iterator[tuple[wire.Open, list[int]]]:
        for request in wire.openings(specs, self._backends, worker.learnt.memory_of, waits=self._waits):
            yield request, self._descriptors(worker, request.specs)

    def keep_on(self, name: socket.socket) -> list[asyncio.Future[wire.Done]]:
        """Let workers continue to serve if this process dies, until a successor finds them by *name*.

        Each returned future ends when its worker is ready to do so.
        """
        self._name = name
        return [worker.send(wire.KeepOn(), [name.fileno()]) for worker in self._workers]

    async def adopt(self, inherited: Iterable[tuple[Inherit, list[socket.socket]]]) -> list[ListenerSpec]:
        """Take over the listeners of another process and serve them as it did; return them.

        Call it before anything else.

        Those that need what the predecessor learns last are read after `begin`.

        Raises:
            OSError, SyncError: the listeners cannot be taken over.
        """
        # In order of workers: if there are fewer workers now, the sockets of the last ones are closed, as announced.
        for inherit, sockets in sorted(inherited, key=lambda part: part[0].worker):
            self._note_inherited(inherit.listeners, sockets)
        self._waits = True
        for name, spec in self._specs.items():
            group = self._sockets[name]
            self._sockets[name] = fit_group(group, name.protocol, spec.proxy_port, len(self._workers), self._limits)
        for refused in await asyncio.gather(*(self._replay(worker) for worker in self._workers)):
            for name, why in refused.items():
                raise SyncError(f"a worker cannot serve {name}: {why}")
        return list(self._specs.values())

    def _note_inherited(self, listeners: wire.Open, sockets: Sequence[socket.socket]) -> None:
        for spec, sock in zip(listeners.specs, sockets, strict=True):
            self._specs[spec.name] = spec
            self._sockets.setdefault(spec.name, []).append(sock)
        self._backends.update(listeners.backends)
        for service_port, memory in listeners.memory:
            for worker in self._workers:
                worker.learnt.note(service_port, memory)

    async def begin(self, memory: Memories) -> None:
        """Begin to read from listeners that wait: the predecessor has stopped. *memory*: the pins it has set last."""
        self._waits = False
        for worker in self._workers:
            worker.send(wire.Begin(memory))

    def inheritance(self) -> Iterator[tuple[Inherit, list[int]]]:
        """Yield the state for a successor, in parts, with descriptors that this process keeps."""
        for worker in self._workers:
            for listeners, descriptors in self._all_of(worker, list(self._specs.values())):
                yield Inherit(worker.settings.worker, listeners), descriptors

    async def make_way(self, successors: int, since: float) -> Memories:
        """Stop accepting at the sockets of the first *successors* workers; return the pins set *since* (monotonic)."""
        asked = [
            worker.send(wire.MakeWay(since, handed_over=index < successors))
            for index, worker in enumerate(self._workers)
        ]
        await asyncio.wait(asked, timeout=_SENT_S)
        answers = [answer.result() for answer in asked if answer.done() and answer.exception() is None]
        return [learnt for answer in answers for learnt in answer.memory]

    def leave(self) -> None:
        """Leave the workers to serve alone, if `keep_on` was called."""
        for worker in self._workers:
            worker.leave()

    # ---- DataPlane

    async def open(self, specs: Sequence[ListenerSpec]) -> Mapping[ListenerName, str]:
        refused: dict[ListenerName, str] = {}
        new, changed = [], []
        async for spec in in_slices(specs, asyncio.get_running_loop().time):
            if spec.name in self._sockets:
                changed.append(spec)
                continue
            try:
                group = open_group(spec.name.protocol, spec.proxy_port, len(self._workers), self._limits)
                self._sockets[spec.name] = group
                new.append(spec)
            except OSError as error:
                refused[spec.name] = refusal(spec.proxy_port, error)
        self._specs.update({spec.name: spec for spec in (*new, *changed)})
        sent = [answer for worker in self._workers for answer in self._send_opened(worker, new, changed)]
        # A worker that has ended refuses no listener: its replacement gets all of them.
        refused.update(_refused(await asyncio.gather(*sent, return_exceptions=True)))
        if opened := [name for name in refused if name in self._specs]:
            with contextlib.suppress(SyncError):  # a worker has ended; its replacement does not get these
                await self.retire(opened)
        return refused

    def _send_opened(
        self, worker: WorkerProcess, new: Sequence[ListenerSpec], changed: Sequence[ListenerSpec]
    ) -> Iterator[asyncio.Future[wire.Done]]:
        for request in wire.fitting(new, wire.OPENED_A_FRAME, lambda part: wire.Open(part, len(part))):
            yield worker.send(request, self._descriptors(worker, request.specs))
        for request in wire.fitting(changed, _A_FRAME, lambda part: wire.Open(part, 0)):
            yield worker.send(request)

    def _descriptors(self, worker: WorkerProcess, specs: Iterable[ListenerSpec]) -> list[int]:
        return [self._sockets[spec.name][worker.settings.worker].fileno() for spec in specs]

    async def reserve(self, port: int) -> str:
        try:
            self._reserved[port] = reserve_refusing_port(port)
        except OSError as error:
            return refusal(port, error)
        return ""

    async def update(self, backends: Mapping[ListenerName, Backends]) -> None:
        self._backends.update({name: given for name, given in backends.items() if name in self._specs})
        await self._send_all(*wire.fitting(list(backends.items()), _A_FRAME, wire.Update))

    async def retire(self, names: Sequence[ListenerName]) -> None:
        for name in names:
            self._forget(name)
        await self._send_all(*wire.fitting(names, _A_FRAME, wire.Retire))
        close_group(self._retired)
        self._retired.clear()

    async def _send_all(self, *requests: wire.Request) -> list[wire.Done]:
        return await answers_to([worker.send(request) for request in requests for worker in self._workers])

    def _serves(self, service_port: ServicePortName) -> bool:
        names = (ListenerName(service_port, scope, transparent) for scope in Scope for transparent in (False, True))
        return any(name in self._specs for name in names)

    def _forget(self, name: ListenerName) -> None:
        self._specs.pop(name, None)
        self._backends.pop(name, None)
        if not self._serves(name.service_port):
            for worker in self._workers:
                worker.learnt.forget(name.service_port)
        self._retired += self._sockets.pop(name, [])

    async def stats(self, endpoints_max: int = 0) -> PlaneStats:
        count = self._count_endpoints()
        answers: list[wire.Done] = []
        with contextlib.suppress(SyncError):
            answers = await self._send_all(wire.GetStats(endpoints=count <= endpoints_max))
        services = (service for answer in answers for service in answer.services)
        totals = sum_of(PlaneStats({}), *(answer.totals for answer in answers if answer.totals is not None))
        stats = add_up(services, totals, count if count > endpoints_max else 0)
        return replace(stats, worker_restarts=self.restarts)

    async def details(self, request: DetailsRequest) -> Details:
        answers: list[wire.Done] = []
        with contextlib.suppress(SyncError):
            answers = await self._send_all(*_split(request))
        return merge([part for answer in answers for part in answer.details])

    def _count_endpoints(self) -> int:
        """Return the number of endpoints. Of one service port's sets, the largest nearly always has them all."""
        counts: dict[ServicePortName, int] = {}
        for name, backends in self._backends.items():
            counts[name.service_port] = max(counts.get(name.service_port, 0), len(backends.usable))
        return sum(counts.values())

    def cut(self) -> None:
        for worker in self._workers:
            worker.cut()

    async def close(self, drain_timeout_s: float, *, successors: int = 0) -> None:
        """Let the workers drain and exit.

        *successors*: new workers already accept at the sockets of this number of workers, from the first on.
        """
        for worker in self._workers:
            worker.end_tasks()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SENT_S):  # a closed descriptor cannot be sent
                await asyncio.gather(*(worker.sent() for worker in self._workers))
        for group in (*self._sockets.values(), *self._reserved.values(), self._retired):
            close_group(group)
        await asyncio.gather(
            *(
                worker.close(drain_timeout_s, handed_over=index < successors)
                for index, worker in enumerate(self._workers)
            )
        )


def _split(request: DetailsRequest) -> Iterator[wire.GetDetails]:
    """Yield *request* in messages about some service ports each; the last one asks for connections of all of them."""
    if request.connections:
        yield wire.GetDetails(request)
    else:
        yield from wire.fitting(
            request.names, _DETAILS_A_FRAME, lambda names: wire.GetDetails(replace(request, names=tuple(names)))
        )


def _refused(answers: Iterable[object]) -> dict[ListenerName, str]:
    return {name: why for answer in answers if isinstance(answer, wire.Done) for name, why in answer.refused}
