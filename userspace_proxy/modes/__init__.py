"""The modes. A mode is added here in one line; its folder holds everything else that is specific to it."""

from collections.abc import Mapping
from types import MappingProxyType

from userspace_proxy.modes.iptables.mode import MODE as _IPTABLES
from userspace_proxy.modes.ipvs.mode import MODE as _IPVS
from userspace_proxy.modes.mode import Mode
from userspace_proxy.modes.nftables.mode import MODE as _NFTABLES
from userspace_proxy.modes.userspace.mode import MODE as _USERSPACE

# In the order in which they are shown.
MODES: Mapping[str, Mode] = MappingProxyType(
    {
        mode.name: mode
        for mode in (
            _USERSPACE,
            _IPTABLES,
            _NFTABLES,
            _IPVS,
        )
    }
)


def annotation_modes(prefix: str) -> Mapping[str, tuple[str, ...]]:
    """Return annotation (with *prefix*) -> the names of the modes that honour it."""
    names = dict.fromkeys(name for mode in MODES.values() for name in mode.annotations)
    return {f"{prefix}{name}": tuple(m.name for m in MODES.values() if name in m.annotations) for name in names}
