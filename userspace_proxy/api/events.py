"""Changes of API objects, as sources report them."""

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from userspace_proxy.api.convert import KubernetesObject
from userspace_proxy.model.names import NamespacedName


class EventType(Enum):
    """SET: the latest version of an object. DELETE: the object was deleted. SYNCED: the initial list is complete."""

    SET = "set"
    DELETE = "delete"
    SYNCED = "synced"


class Origin(Protocol):
    """The place where an object is defined, for error messages."""

    def where(self, field: str = "") -> str:
        """Return the place of *field* (a path such as ``spec.ports[0].port``); for files, ``file:line``."""
        ...


@dataclass(frozen=True, slots=True)
class ObjectEvent:
    """One change of one object. ``kind``, ``name`` and ``origin`` are set for every type but SYNCED."""

    type: EventType
    kind: str = ""
    name: NamespacedName | None = None
    object: KubernetesObject | None = None
    origin: Origin | None = None
