"""Virtual servers of ipvs, as ``ipvsadm --restore`` reads them, and the addresses that make them reachable. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from userspace_proxy.modes.reasons import nft_text
from userspace_proxy.modes.reasons.known import Known, host
from userspace_proxy.modes.reasons.lines import Line
from userspace_proxy.modes.slots import explain as slots

_SCHEDULERS = {
    "rr": "each new connection goes to the next endpoint (rr: round robin)",
    "wrr": "each new connection goes to the next endpoint, more often to those of more weight (wrr)",
    "lc": "a new connection goes to the endpoint that has fewest (lc: least connections)",
    "wlc": "a new connection goes to the endpoint that has fewest for its weight (wlc)",
    "lblc": "as wlc, but one destination keeps its endpoint while that is not overloaded (lblc)",
    "lblcr": "as lblc, with a set of endpoints for one destination (lblcr)",
    "dh": "a hash of the destination's address chooses the endpoint (dh)",
    "sh": "a hash of the client's address chooses the endpoint (sh)",
    "sed": "a new connection goes to where it is expected to wait least (sed)",
    "nq": "a new connection goes to an idle endpoint, else as with sed (nq: never queue)",
    "fo": "all go to the endpoint of the highest weight (fo: failover)",
    "ovf": "all go to the endpoint of the highest weight, what is more than its weight to the next (ovf: overflow)",
    "mh": "a hash of the client's address chooses the endpoint, by Maglev's table (mh)",
    "twos": "of two endpoints drawn by chance, the one with fewer connections for its weight (twos)",
}
_FORWARDS = {
    "-m": "the packet's destination becomes the endpoint's address and port (-m: masquerading, which is NAT)",
    "-g": "the packet goes to the endpoint as it is (-g: direct routing)",
    "-i": "the packet goes to the endpoint in a tunnel (-i)",
}
_TOOLS = {
    "# nft -f -": "First nftables, which sees packets before ipvs does: who may dial, who is refused or masqueraded.",
    "# ip -batch -": "Then the addresses of Services: this node's own, so that packets to them come to INPUT.",
    "# ipvsadm --restore": "Then the virtual servers: who is led on by nftables meets one of them.",
}


def lines(text: str, known: Known, *, is_short: bool = False) -> Iterator[Line]:
    """Yield what `ipvsadm --restore` and `ip` are told, and the nftables table between, explained.

    What is not known here stands there without a word.
    """
    of_table: list[str] = []
    for line in text.splitlines():
        if of_table or line.startswith("table "):
            of_table.append(line)
        else:
            yield Line(line, *explain(line, known))
        if line == "}":
            table = nft_text.parse("\n".join(of_table))
            shown = nft_text.without_the_useless(table, slots.dead_rules(table)) if is_short else table
            yield from nft_text.write(shown, slots.explainer(table, known))
            of_table = []


def explain(line: str, known: Known) -> tuple[str, str]:
    """Return what *line* does, and whose it is; lines of `ip` with the name of the tool or without."""
    words = line.split()
    if words[:1] in (["-A"], ["-a"]):
        return _virtual_server(words, known) if words[0] == "-A" else _endpoint(words, known)
    match words[1:] if words[:1] == ["ip"] else words:
        case ["address", "add" | "replace", address, "dev", device]:
            return _address(address, device), known.owner_of(host(address))
        case ["address", "add" | "replace", address, "nodad", "dev", device]:
            return f"{_address(address, device)} Nobody else is asked for it (nodad).", known.owner_of(host(address))
        case ["link", "add", device, "up", "group", _, "type", "dummy"]:
            return (
                f"A device that leads nowhere: {device} only holds addresses of Services. kube-proxy makes one of this "
                "name, too; the group says that it is ours."
            ), ""
    return _TOOLS.get(line, ""), ""


def _address(address: str, device: str) -> str:
    return (
        f"{host(address)} becomes an address of this node, at the device {device}, so that packets "
        f"to it come to INPUT, where "
        "ipvs looks at them."
    )


def _portal(words: list[str]) -> tuple[str, str, str] | None:
    """Return the address, port and protocol of the virtual server that *words* name."""
    if len(words) < 2 or words[0] not in ("-t", "-u"):
        return None
    address, _, port = words[1].rpartition(":")
    return (address.strip("[]"), port, "tcp" if words[0] == "-t" else "udp") if port.isdigit() else None


def _options(words: Iterable[str], takes: str) -> dict[str, str] | None:
    """Return the options in *words*; those in *takes* have a value. None where there is another one."""
    found: dict[str, str] = {}
    left = iter(words)
    for word in left:
        if word in takes.split():
            value = next(left, None)
            if value is None:
                return None
            found[word] = value
        elif word in _FORWARDS or word == "--ops":
            found[word] = ""
        else:
            return None
    return found


def _virtual_server(words: list[str], known: Known) -> tuple[str, str]:
    portal, options = _portal(words[1:]), _options(words[3:], "-s -p -b")
    if portal is None or options is None or (scheduler := _SCHEDULERS.get(options.pop("-s", ""))) is None:
        return "", ""
    pinned = options.pop("-p", "")
    flags = options.pop("-b", "")
    if options or flags not in ("", "flag-3"):
        return "", ""
    said = f"A virtual server for {known.portal(*portal)}: {scheduler}."
    if pinned:
        said += (
            f" Affinity: a client meets the same endpoint again until it has been away for {pinned} s (-p: persistent)."
        )
    if flags:
        said += " flag-3 means nothing to the scheduler; it tells ours from others'."
    return said, known.owner(*portal)


def _endpoint(words: list[str], known: Known) -> tuple[str, str]:
    portal, options = _portal(words[1:]), _options(words[3:], "-r -w")
    if portal is None or options is None or "-r" not in options:
        return "", ""
    endpoint, weight = options.pop("-r"), options.pop("-w", "1")
    if len(options) != 1 or (forward := _FORWARDS.get(next(iter(options)))) is None:
        return "", ""
    if weight == "0":
        share = "weight 0: no new connections, open ones go on"
    else:
        share = f"weight {weight}: its share beside the others', where the scheduler asks for weights"
    return f"{endpoint} is an endpoint of {known.portal(*portal)}; {forward}; {share}.", known.owner(*portal)
