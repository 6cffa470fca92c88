"""What a mode is: one object with everything that differs between modes. Each mode's folder has one, as `MODE`.

To list modes must cost nothing: a mode's `mode.py` imports the rest of its code inside the functions that need it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from userspace_proxy.control.proxy_ports import ProxyPorts
    from userspace_proxy.host.firewalls import Passage
    from userspace_proxy.interfaces import DataPlane, ListenerSpec, Proxier
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
    """What a proxier is made of.

    ``plane``, ``ports`` and ``inherited`` (the listeners of a predecessor) matter to modes that open listeners.
    """

    plane: DataPlane
    ports: ProxyPorts
    rules: NodeRules
    inherited: Sequence[ListenerSpec] = ()


@dataclass(frozen=True, slots=True)
class PreparedMode:
    """A mode that this host can have. Nothing has been changed on the host.

    ``transparent_obstacle``: why endpoints cannot see clients' addresses here, "" if they can. ``leftovers`` remove
    rules of this mode that were loaded in another rule language than the one that is used now.
    """

    make_proxier: Callable[[ProxierRequest], Proxier]
    transparent_obstacle: str = ""
    leftovers: Sequence[Removal] = ()


@dataclass(frozen=True, slots=True)
class RenderRequest:
    """What to render: the rules for ``state`` in ``language``; of service ports ``names`` only, unless that is None."""

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
    no workers, and SIGTERM leaves the rules. ``prepare`` checks what the host has to have, and raises SyncError if it
    lacks something. ``removals`` remove everything that the mode leaves on a host, whichever process put it there.
    ``languages``: the rule languages that it is rendered in, the usual one first. ``render``
    returns the rules with the reason of each line. ``firewall_passages``: where a foreign firewall can drop the
    traffic of Services. ``annotations``: those of Services that this mode honours, without their prefix;
    ``name: value`` for one value.
    ``node_port_addresses``: where node ports are served unless a setting says so. Which settings apply in a mode is in
    their table (`config/settings.py`).
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
    node_port_addresses: tuple[str, ...] = ()

    def languages_for(self, asked: str) -> tuple[str, ...]:
        """Return the language to render for `--rules` *asked*, or every one for "all"."""
        if asked == "all":
            return self.languages
        return (asked,) if asked in self.languages else self.languages[:1]
