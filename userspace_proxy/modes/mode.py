"""A mode is one object with everything that differs between modes. Each mode's folder has one, named `MODE`.

Listing the modes must be cheap: a mode's `mode.py` imports the rest of its code inside the functions that need it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from userspace_proxy.control.proxy_ports import ProxyPorts
    from userspace_proxy.host.firewalls import Passage
    from userspace_proxy.interfaces import DataPlane, Proxier
    from userspace_proxy.model.listeners import ListenerSpec
    from userspace_proxy.model.names import ServicePortName
    from userspace_proxy.model.state import ProxyState
    from userspace_proxy.modes.plans import NodeRules
    from userspace_proxy.modes.rule_line import Rules

Removal = Callable[[], Awaitable[None]]


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
    leftovers: Sequence[Removal] = ()


@dataclass(frozen=True, slots=True)
class RenderRequest:
    """The rules to render: for ``state`` in ``language``. ``names``: only these service ports, None for all."""

    settings: ModeSettings
    state: ProxyState
    ports: ProxyPorts
    rules: NodeRules
    language: str
    names: Set[ServicePortName] | None = None


@dataclass(frozen=True, slots=True)
class Mode:
    """Everything that is specific to one mode.

    ``description``: one line for the command line's help. ``kernel_serves``: traffic never enters this process; it has
    no workers, and SIGTERM leaves the rules. ``prepare`` checks whether the host supports the mode; it raises SyncError
    if not. ``removals`` remove everything that the mode leaves on a host, also after a crash. ``languages``: the rule
    languages in which it can be rendered, the default first. ``render`` returns the rules, each line with its reason.
    ``firewall_passages``: where a firewall of another program can drop traffic of Services. ``annotations``: those that
    this mode honours, without their prefix; ``name: value`` for one value. ``choice``: how the kernel chooses an
    endpoint. ``shares_kube_proxys_chains``: its rules are in chains with kube-proxy's names. ``node_port_addresses``:
    the addresses that serve node ports by default. The table of settings (`config/settings.py`) says which settings
    apply in a mode.
    """

    name: str
    description: str
    kernel_serves: bool
    prepare: Callable[[ModeSettings], Awaitable[PreparedMode]]
    removals: Callable[[ModeSettings], Sequence[Removal]]
    languages: tuple[str, ...]
    render: Callable[[RenderRequest], Rules]
    firewall_passages: tuple[Passage, ...] = ()
    annotations: tuple[str, ...] = ()
    choice: str = ""
    shares_kube_proxys_chains: bool = False
    node_port_addresses: tuple[str, ...] = ()

    def languages_for(self, asked: str) -> tuple[str, ...]:
        """Return the language to render for `--rules` *asked*; all of them for "all"."""
        if asked == "all":
            return self.languages
        return (asked,) if asked in self.languages else self.languages[:1]
