"""Userspace mode: rules redirect packets to listeners of this proxy, which accepts, dials an endpoint and splices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from userspace_proxy.host.firewalls import REDIRECTED
from userspace_proxy.modes.mode import CleanUp, Mode, ModeSettings, PreparedMode, ProxierRequest, RenderRequest

if TYPE_CHECKING:
    from userspace_proxy.interfaces import Proxier
    from userspace_proxy.modes.rule_line import Rules


class UserspaceMode(Mode):
    """A mode whose rules redirect packets to listeners of the data plane."""

    async def prepare(self, settings: ModeSettings) -> PreparedMode:
        from userspace_proxy.modes.userspace.loader import KERNELS, choose_language
        from userspace_proxy.modes.userspace.transparent_replies import transparent_obstacles

        language = choose_language(settings.rules)

        def make_proxier(request: ProxierRequest) -> Proxier:
            from userspace_proxy.modes.userspace.proxier import UserspaceProxier
            from userspace_proxy.modes.userspace.redirects import RedirectTranslator

            kernel = KERNELS[language]()
            translator, watches = RedirectTranslator(request.rules), settings.capture == "auto"
            proxier = UserspaceProxier(request.plane, kernel, request.ports, translator, watches_interfaces=watches)
            proxier.adopt(request.inherited)
            return proxier

        return PreparedMode(
            make_proxier,
            transparent_obstacle="; ".join(await transparent_obstacles(language)),
            # Reply routes stay: both languages share them.
            leftovers=tuple(make().remove_rules for other, make in KERNELS.items() if other != language),
        )

    def clean_ups(self, settings: ModeSettings) -> Sequence[CleanUp]:
        from userspace_proxy.modes.userspace.loader import KERNELS

        return tuple(make().remove for make in KERNELS.values())

    def render(self, request: RenderRequest) -> Rules:
        from userspace_proxy.modes.userspace import iptables, nft
        from userspace_proxy.modes.userspace.redirects import RedirectTranslator

        translator = RedirectTranslator(request.rules)
        translator.plan(request.state)
        translator.open_all(request.ports)
        translator.translate()
        translations, facts = request.chosen(translator.translations).values(), translator.facts()
        in_iptables = request.language == "iptables"
        return iptables.rules(translations, facts) if in_iptables else nft.RedirectTable().rules(facts, translations)


MODE = UserspaceMode(
    name="userspace",
    description="this proxy serves, by sockets of its own",
    kernel_serves=False,
    languages=("nftables", "iptables"),
    firewalled_traffic=(REDIRECTED,),
    annotations=(
        "source-ip",
        "balance",
        "weights",
        "slow-start",
        "on-endpoint-removal",
        "max-connection-age",
        "wait-for-endpoints",
    ),
)
