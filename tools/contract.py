"""Write the lists and tables of docs/reference/contract.md from the contract and the rules (`make reference`)."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

from userspace_proxy.control.contract import Terms, contract, ignored_is_shown_by
from userspace_proxy.control.lint.api_rules import RULES
from userspace_proxy.control.lint.relations import ADDRESSES_MAX, ENDPOINTS_MAX, HINTS_MAX, RELATIONS

_TABLE = re.compile(r"(<!-- (fields|refusals) of (\w+) -->\n).*?(?=<!-- end -->)", re.DOTALL)

# What the functions of lint/relations.py find.
_CONTRADICTIONS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "EndpointSlice": (
        ("endpoints", f"{ENDPOINTS_MAX} at most"),
        ("endpoints[].addresses", f"1 to {ADDRESSES_MAX}; each of the family that addressType says"),
        ("endpoints[].hints.forZones, forNodes", f"{HINTS_MAX} at most each, no name twice"),
        ("ports[].name", "Each once; so only one port has none"),
    ),
    "Endpoints": (
        ("subsets[]", "Has addresses or notReadyAddresses"),
        ("subsets[].ports[].name", "Each of several ports has one"),
    ),
    "Pod": (
        ("spec.containers[].ports[].name", "Each once in a container, if it has one"),
        ("status.podIPs", "One a family, the first that of podIP"),
    ),
    "Node": (("spec.podCIDRs", "One a family, the first that of podCIDR"),),
}


def page(text: str) -> str:
    """Return *text*, the page docs/reference/contract.md, with its lists and tables generated anew."""
    return _TABLE.sub(
        lambda found: found[1] + (_items(contract()[found[3]]) if found[2] == "fields" else _refusals(found[3])), text
    )


def _refusals(kind: str) -> str:
    """Return a Markdown table of what the API server rejects in *kind*."""
    rows = [(rule.field, f"{rule.demand[0].upper()}{rule.demand[1:]}") for rule in RULES[kind]]
    rows += [(each.field, f"{each.demand[0].upper()}{each.demand[1:]}.") for each in RELATIONS if kind == "Service"]
    rows += [(field, f"{demand}.") for field, demand in _CONTRADICTIONS.get(kind, ())]
    return "".join(f"{row}\n" for row in ["| field | |", "|---|---|", *(f"| `{a}` | {b} |" for a, b in rows)])


def _items(terms: Terms) -> str:
    """Return a Markdown list with one item for each field and the tests written for it."""
    items = []
    for clause in terms.clauses.values():
        tests = [f"`{test.removeprefix('tests/')}`" for test in clause.shown_by if test != ignored_is_shown_by()]
        shown_by = f" Shown by {', '.join(tests)}." if tests else ""
        items.append(_wrap(f"- `{clause.field}`: *{clause.treatment}*. {clause.how}{shown_by}"))
    return "".join(f"{item}\n" for item in items)


def _wrap(item: str) -> str:
    """Return *item* wrapped at 118 characters; inline code is never broken."""
    whole = re.sub(r"`[^`]*`", lambda code: code[0].replace(" ", "\0"), item)
    lines = textwrap.wrap(whole, 118, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
    return "\n".join(lines).replace("\0", " ")


if __name__ == "__main__":
    _file = Path(sys.argv[1])
    _file.write_text(page(_file.read_text()))
