"""The latest events of each Service, for `describe`. Bounded, and lost when the process ends."""

import time
from collections import OrderedDict, deque

from userspace_proxy.model.answers import EventAnswer
from userspace_proxy.model.names import NamespacedName

_EVENTS_MAX = 20
_SERVICES_MAX = 2_000


class Journal:
    """Events by Service, the Services with the latest events last. Events under None concern every Service."""

    def __init__(self) -> None:
        self._events: OrderedDict[NamespacedName | None, deque[EventAnswer]] = OrderedDict()

    def note(self, service: NamespacedName | None, what: str) -> None:
        """Note that *what* has happened to *service*. A repetition is counted."""
        events = self._events.setdefault(service, deque(maxlen=_EVENTS_MAX))
        self._events.move_to_end(service)
        count = 1
        if events and events[-1].what == what:
            count += events.pop().count
        events.append(EventAnswer(time.time(), what, count))
        if len(self._events) > _SERVICES_MAX:
            self._events.popitem(last=False)

    def of(self, service: NamespacedName) -> list[EventAnswer]:
        """Return the events of *service* and those of every Service, the latest last."""
        return sorted((*self._events.get(service, ()), *self._events.get(None, ())), key=lambda event: event.at)
