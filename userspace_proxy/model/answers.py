"""What the control socket answers: values that JSON shows and commands print. Pure.

Times are wall-clock seconds, 0 for never. A change of a field's meaning or name raises VERSION.
"""

from dataclasses import dataclass, field

VERSION = 1


@dataclass(frozen=True, slots=True)
class ServiceAnswer:
    """One Service. ``ports`` as in kubectl: ``80:30080/TCP``. ``problem``: why it is not served as written."""

    namespace: str
    name: str
    type: str
    cluster_ips: list[str]
    external_ips: list[str]
    ports: list[str]
    since: float
    selector: dict[str, str] = field(default_factory=dict)
    problem: str = ""


@dataclass(frozen=True, slots=True)
class EndpointAnswer:
    """One endpoint of one service port.

    ``state``: ready, not-ready, terminating, unhealthy (by probes) or ejected (by dials), with the ``reason`` and
    ``until`` when. ``last_failure`` is that of the last failed dial. ``share``: its present part of its usual
    connections; below 1 in slow start.
    """

    namespace: str
    service: str
    port: str
    address: str
    state: str
    reason: str = ""
    since: float = 0.0
    until: float = 0.0
    node: str = ""
    weight: int = 1
    open: int = 0
    opened: int = 0
    pins: int = 0
    last_failure: str = ""
    failed_at: float = 0.0
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class ConnectionAnswer:
    """One open TCP connection or UDP flow. ``endpoint``: "" while it is being dialled."""

    namespace: str
    service: str
    port: str
    protocol: str
    client: str
    portal: str
    endpoint: str
    why: str
    age_s: float
    bytes_to_backend: int
    bytes_to_client: int


@dataclass(frozen=True, slots=True)
class EventAnswer:
    """An event that `describe` shows. ``count``: how often it occurred in a row."""

    at: float
    what: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class Description:
    """All that is known of one Service. ``facts``: name and value, in the order in which they are shown."""

    service: ServiceAnswer
    facts: dict[str, str]
    endpoints: list[EndpointAnswer]
    events: list[EventAnswer]


@dataclass(frozen=True, slots=True)
class Candidate:
    """An endpoint that the next connection may get, with the probability (0 to 1) and the reason."""

    endpoint: str
    probability: float
    why: str


@dataclass(frozen=True, slots=True)
class Unused:
    """An endpoint that the next connection does not get, and why not."""

    endpoint: str
    why: str


@dataclass(frozen=True, slots=True)
class Obstacle:
    """Why clients cannot reach a Service, and the fix."""

    reason: str
    fix: str


@dataclass(frozen=True, slots=True)
class Explanation:
    """Where the next connection to a service port goes, and why.

    ``rules``: "loaded" if the rules that lead there are in the kernel, else what is wrong with them. ``unknown``: what
    this proxy cannot know. ``notes``: what is wrong for some of the clients only, or probably.
    """

    service: str
    port: str
    portal: str
    client: str
    mode: str
    next: list[Candidate]
    unused: list[Unused]
    rules: str
    obstacle: Obstacle | None = None
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
