"""A mode is one object with everything that differs between modes. Each mode's folder has one, named `MODE`.

`MODE` is a `KernelMode`, or an instance of a subclass of `Mode` in that folder.

Listing the modes must be cheap: a mode's `mode.py` imports the rest of its code inside the functions that need it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from userspace_proxy.control.proxy_ports import ProxyPorts
    from userspace_proxy.host.firewalls import ServiceTraffic
    from userspace_proxy.interfaces import DataPlane, Proxier
    from userspace_proxy.model.listeners import ListenerSpec
    from userspace_proxy.model.names import ServicePortName
    from userspace_proxy.model.state import ProxyState
    from userspace_proxy.modes.kernel_rules import Translation
    from userspace_proxy.modes.plans import NodeRules
    from userspace_proxy.modes.rule_line import Rules

CleanUp = Callable[[], Awaitable[None]]


class ModeSettings(Protocol):
    """The settings that modes read; `config.settings.Settings` has them all. Modes do not import `config`."""

    @property
    def rules(self) -> str: ...
    @property
    def capture(self) -> str: ...
    @property
    def service_ranges(self) -> Sequence[object]: ...
    @property
    def masquerade_all(self) -> bool: ...
    @property
    def masquerade_bit(self) -> int: ...
    @property
    def localhost_nodeports(self) -> bool: ...
    @property
    def conntrack_tcp_be_liberal(self) -> bool: ...
    @property
    def ipvs_scheduler(self) -> str: ...
    @property
    def ipvs_strict_arp(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class ProxierRequest:
    """The parts that a proxier gets.

    ``plane``, ``ports`` and ``inherited`` (the listeners of a predecessor) are for modes that open listeners.
    """

    plane: DataPlane
    ports: ProxyPorts
    rules: NodeRules
    inherited: Sequence[ListenerSpec] = ()


@dataclass(frozen=True, slots=True)
class PreparedMode:
    """A mode that this host supports. Nothing has been changed on the host.

    ``transparent_obstacle``: why endpoints cannot see clients' addresses here, "" if they can. ``leftovers`` remove
    rules of this mode in other rule languages than the one in use.
    """

    make_proxier: Callable[[ProxierRequest], Proxier]
    transparent_obstacle: str = ""
    leftovers: Sequence[CleanUp] = ()


@dataclass(frozen=True, slots=True)
class RenderRequest:
    """The rules to render: for ``state`` in ``language``. ``names``: only these service ports, None for all."""

    settings: ModeSettings
    state: ProxyState
    ports: ProxyPorts
    rules: NodeRules
    language: str
    names: Set[ServicePortName] | None = None

    def chosen(self, translations: Mapping[ServicePortName, Translation]) -> dict[ServicePortName, Translation]:
        """Return the *translations* to render, in the order of the state."""
        names = translations.keys() if self.names is None else translations.keys() & self.names
        return {name: translations[name] for name in self.state.service_ports if name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode(ABC):
    """Everything that is specific to one mode.

    ``description``: one line for the command line's help. ``kernel_serves``: traffic never enters this process; it has
    no workers, and SIGTERM leaves the rules. ``languages``: the rule languages in which it can be rendered, the default
    first. ``firewalled_traffic``: where a firewall of another program can drop traffic of Services. ``annotations``:
    those that this mode honours, without their prefix; ``name: value`` for one value. ``choice``: how the kernel
    chooses an endpoint. ``shares_kube_proxys_chains``: its rules are in chains with kube-proxy's names.
    ``node_port_addresses``: the addresses that serve node ports by default. ``config_section``: the section of a
    KubeProxyConfiguration that holds its settings. The table of settings (`config/settings.py`) says which settings
    apply in a mode.
    """

    name: str
    description: str
    kernel_serves: bool
    languages: tuple[str, ...]
    firewalled_traffic: tuple[ServiceTraffic, ...]
    annotations: tuple[str, ...] = ()
    choice: str = ""
    shares_kube_proxys_chains: bool = False
    node_port_addresses: tuple[str, ...] = ()
    config_section: str = "iptables"

    @abstractmethod
    async def prepare(self, settings: ModeSettings) -> PreparedMode:
        """Check whether this host supports the mode. Raises SyncError if not."""

    @abstractmethod
    def clean_ups(self, settings: ModeSettings) -> Sequence[CleanUp]:
        """Return functions that remove everything that the mode leaves on a host, also after a crash."""

    @abstractmethod
    def render(self, request: RenderRequest) -> Rules:
        """Return the requested rules, each line with its reason."""

    def languages_for(self, asked: str) -> tuple[str, ...]:
        """Return the language to render for `--rules` *asked*; all of them for "all"."""
        if asked == "all":
            return self.languages
        return (asked,) if asked in self.languages else self.languages[:1]


class RenderedMode(NamedTuple):
    """A mode in one of its rule languages, as `render` shows it."""

    mode: Mode
    language: str

    def __str__(self) -> str:
        return f"{self.mode.name} ({self.language})" if len(self.mode.languages) > 1 else self.mode.name
