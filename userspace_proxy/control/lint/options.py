"""The options of `run` that decide what is wrong with manifests."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from userspace_proxy.control.pools import Network
from userspace_proxy.model.service import SourceIP


@dataclass(frozen=True, slots=True)
class LintOptions:
    """The options of `run` that decide which manifests are wrong.

    ``mode`` and ``node`` are "" if they are not known. ``names_unserved``: note which Services no proxy serves.
    ``annotation_modes``: annotation of this proxy, or ``annotation: value`` -> the modes that honour it.
    """

    cluster_ips: Sequence[Network]
    load_balancer_pool: Sequence[Network] = ()
    proxy_name: str = ""
    source_ip: SourceIP = SourceIP.NODE
    mode: str = ""
    node: str = ""
    names_unserved: bool = False
    annotation_modes: Mapping[str, Sequence[str]] = field(default_factory=dict)
