"""A private edge-triggered epoll inside the asyncio loop.

asyncio's own readers cost a Handle, a dictionary and two epoll_ctl calls for every change of interest. Here a socket
is registered once, for all events, edge-triggered. Its handler gets the event mask and must continue until EAGAIN, or
ask for `again`. The epoll descriptor itself is one reader of the event loop, so asyncio code runs beside it.

Handlers must tolerate false events. A closed socket is not removed from the epoll; the kernel removes it with its last
descriptor. That is usually at once. But a child process that a thread is just starting holds copies of all
descriptors until it executes. Until then, a closed socket may still report events under a number that belongs to
another socket by now. An edge-triggered event is therefore a hint: the handler asks the kernel.

Listeners have their own level-triggered epoll, so that one call pauses all accepting.
"""

import asyncio
import logging
import select
from collections import deque
from collections.abc import Callable
from socket import SocketType

Handler = Callable[[int], None]

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
# The peer sends no more, or the connection is gone: read on until the kernel confirms it.
HANGUP = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
FAILED = select.EPOLLERR | select.EPOLLHUP
# TCP urgent data: a read stops before it, although more bytes follow.
URGENT = select.EPOLLPRI

_CONNECTION_MASK = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLPRI | select.EPOLLET
_EVENTS_A_TURN = 256
# Bytes of a bulk step, alone and beside other traffic.
BULK_BYTES = 1 << 20
BULK_SHARED_BYTES = 256 << 10
_BULK_STEPS_A_TURN = 4

log = logging.getLogger(__name__)


def _ignore(events: int) -> None:
    pass


class Poller:
    """Calls handlers when sockets are ready. Not thread-safe: use it in the loop's thread only."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._handlers: dict[int, Handler] = {}
        self._in_turn = False
        # Number of messages moved, counted by the code that moves them. While it rises, bulk work yields.
        self.messages = 0
        self._messages_seen = 0
        self._acceptors: dict[int, Callable[[], object]] = {}
        self._again: list[Callable[[], None]] = []
        self._bulk: deque[Callable[[int], bool]] = deque()
        self._closing: list[SocketType] = []
        self._connections = select.epoll()
        self._listeners = select.epoll()
        self.accepting = True
        self._stopped = False
        loop.add_reader(self._connections.fileno(), self._turn)
        loop.add_reader(self._listeners.fileno(), self._accept_turn)

    # ---- connections

    def watch(self, sock: SocketType, handler: Handler) -> None:
        """Call *handler* with the events of *sock*, first as soon as it is readable or writable.

        For a watched socket, replace the handler; the new one gets all current events again.
        """
        fd = sock.fileno()
        if fd in self._handlers:
            self._connections.modify(fd, _CONNECTION_MASK)
        else:
            self._connections.register(fd, _CONNECTION_MASK)
        self._handlers[fd] = handler

    def hand_over(self, sock: SocketType, handler: Handler) -> None:
        """Replace the handler of a watched socket; the new one gets only new events."""
        self._handlers[sock.fileno()] = handler

    def mute(self, sock: SocketType) -> None:
        """Drop the events of a watched socket until `watch`, whose handler gets all current events again."""
        self._handlers[sock.fileno()] = _ignore

    def close(self, sock: SocketType) -> None:
        """Stop watching *sock*, and close it at the end of this turn.

        Closing it at once would be wrong: the kernel would give its number to the next socket, and remaining events of
        the old socket in this turn would reach the new one's handler.
        """
        fd = sock.fileno()
        if fd < 0:
            return
        self._handlers.pop(fd, None)
        if not self._closing and not self._in_turn:
            self._loop.call_soon(self._close_all)
        self._closing.append(sock)

    def again(self, step: Callable[[], None]) -> None:
        """Call *step* in the next turn: a socket may have more to read, but others are handled first."""
        if not self._again:
            self._loop.call_soon(self._take_again)
        self._again.append(step)

    def in_bulk(self, step: Callable[[int], bool]) -> None:
        """Call *step* with the bytes it may move, in turn with others, until it returns False.

        Between two steps every small event is handled, so a bulk transfer delays a message by one step at most.
        """
        if not self._bulk:
            self._loop.call_soon(self._bulk_turn)
        self._bulk.append(step)

    def _bulk_turn(self) -> None:
        """Take a bulk step; while no message moves, several of the same transfer. Then it is the next one's turn.

        Several, because a transfer's next megabyte costs less than half as much as the first one of another transfer.
        """
        if self._stopped:
            return
        step = self._bulk[0]  # stays queued, so that bulk that begins in this turn does not schedule a second one
        more = True
        for _ in range(_BULK_STEPS_A_TURN):
            more, is_alone = self._take_bulk_step(step)
            if not (more and is_alone):
                break
            if self.accepting:
                self._accept_turn()
        if not self._bulk:  # stopped meanwhile
            return
        self._bulk.popleft()
        if more:
            self._bulk.append(step)
        if self._bulk:
            self._loop.call_soon(self._bulk_turn)

    def _take_bulk_step(self, step: Callable[[int], bool]) -> tuple[bool, bool]:
        """Handle small events, then take *step*.

        Return whether there may be more to move, and whether no message has moved since the last step.
        """
        try:
            self._turn()
            is_alone = self._messages_seen == self.messages
            self._messages_seen = self.messages
            return not self._stopped and step(BULK_BYTES if is_alone else BULK_SHARED_BYTES), is_alone
        except Exception:
            log.exception("a bug: a bulk step was not taken")
            return False, False

    def _turn(self) -> None:
        """Handle all ready events."""
        handler_of = self._handlers.get
        ready = self._connections.poll(0, _EVENTS_A_TURN)
        self._in_turn = True
        for fd, events in ready:
            handler = handler_of(fd)
            if handler is not None:
                try:
                    handler(events)
                except Exception:
                    log.exception("a bug: an event was not handled")
        self._in_turn = False
        if self._closing:
            self._close_all()

    def _take_again(self) -> None:
        steps, self._again = self._again, []
        for step in steps:
            try:
                step()
            except Exception:
                log.exception("a bug: a step was not taken")

    def _close_all(self) -> None:
        closing, self._closing = self._closing, []
        for sock in closing:
            sock.close()

    # ---- listeners

    def accept_from(self, sock: SocketType, acceptor: Callable[[], object]) -> None:
        """Call *acceptor* whenever *sock* (a listener or an unconnected UDP socket) is readable."""
        self._acceptors[sock.fileno()] = acceptor
        self._listeners.register(sock.fileno(), select.EPOLLIN)

    def leave(self, sock: SocketType) -> None:
        """Stop accepting from *sock*; the caller closes it."""
        if self._acceptors.pop(sock.fileno(), None) is not None:
            self._listeners.unregister(sock.fileno())

    def pause_accepting(self) -> None:
        """Leave new connections in the kernel's accept queues until `resume_accepting`."""
        if self.accepting:
            self.accepting = False
            self._loop.remove_reader(self._listeners.fileno())

    def resume_accepting(self) -> None:
        if not self.accepting and not self._stopped:
            self.accepting = True
            self._loop.add_reader(self._listeners.fileno(), self._accept_turn)

    def _accept_turn(self) -> None:
        for fd, _ in self._listeners.poll(0, _EVENTS_A_TURN):
            acceptor = self._acceptors.get(fd)
            if acceptor is None or not self.accepting:
                continue
            try:
                acceptor()
            except Exception:
                log.exception("a bug: accepting failed")

    def stop(self) -> None:
        """Close the pending sockets and both epolls. Scheduled steps are dropped."""
        if self._stopped:
            return
        self._stopped = True
        self._again.clear()
        self._bulk.clear()
        self._loop.remove_reader(self._connections.fileno())
        if self.accepting:
            self._loop.remove_reader(self._listeners.fileno())
        self._close_all()
        self._connections.close()
        self._listeners.close()
