"""Messages of an API server, reduced to the fields that a reflector reads: list pages, watch events, errors."""

import msgspec

from userspace_proxy.model.names import NamespacedName


class Meta(msgspec.Struct):
    """Metadata of an object, or of a list."""

    name: str = ""
    namespace: str | None = None
    resource_version: str = msgspec.field(default="", name="resourceVersion")
    annotations: dict[str, str] | None = None
    continue_: str | None = msgspec.field(default=None, name="continue")


class Item(msgspec.Struct):
    """An object, of which only the metadata is read."""

    metadata: Meta


class ObjectList(msgspec.Struct):
    """A list of objects, or one page of it; ``metadata.continue_`` is the token for the next page."""

    metadata: Meta
    items: list[msgspec.Raw] | None = None


class WatchEvent(msgspec.Struct):
    """One line of a watch: ``type`` is ADDED, MODIFIED, DELETED, BOOKMARK or ERROR (then the object is a Status)."""

    type: str
    object: msgspec.Raw


class Cause(msgspec.Struct):
    """One cause of an error, as a machine-readable reason."""

    reason: str | None = None


class StatusDetails(msgspec.Struct):
    """Details of an error beyond its message."""

    causes: list[Cause] | None = None


class Status(msgspec.Struct):
    """The API server's description of an error."""

    message: str | None = None
    code: int | None = None
    details: StatusDetails | None = None


ITEM = msgspec.json.Decoder(Item)
LIST = msgspec.json.Decoder(ObjectList)
EVENT = msgspec.json.Decoder(WatchEvent)
STATUS = msgspec.json.Decoder(Status)


def name_and_version(raw: msgspec.Raw) -> tuple[NamespacedName, int]:
    """Return the name and the resource version of the object *raw*."""
    meta = ITEM.decode(raw).metadata
    return NamespacedName(meta.namespace or "", meta.name), int(meta.resource_version)
