"""Explained rules as text that their tools still read, and as JSON. Pure."""

import json
import textwrap
from collections.abc import Iterator, Sequence

from userspace_proxy.explain.lines import Explained, Line
from userspace_proxy.explain.words import words_in

_WIDTH = 118
_TAB = 4


def as_text(found: Sequence[Explained], *, explains: bool) -> str:
    """Return *found* one below the other; everything but the rules is a comment."""
    parts = ["\n".join(_of_mode(mode, explains=explains, has_title=len(found) > 1)) for mode in found]
    if explains:
        meanings = words_in(line for mode in found for line in mode.lines).items()
        parts.insert(0, "\n".join(part for word, meaning in meanings for part in _comment(f"{word}: {meaning}", "")))
    return "\n\n".join(parts) + "\n"


def _of_mode(mode: Explained, *, explains: bool, has_title: bool) -> Iterator[str]:
    if has_title:
        yield f"# ---- {mode.rendered} {'-' * (_WIDTH - 8 - len(str(mode.rendered)))}"
    for line in mode.lines:
        if explains and opens_block(line):
            yield ""
        yield from _explained(line) if explains else [line.text]


def opens_block(line: Line) -> bool:
    """Return whether *line* begins a table of iptables, or a set, map or chain of nftables."""
    return line.text.startswith(("*", "\tchain ", "\tmap ", "\tset "))


def _explained(line: Line) -> Iterator[str]:
    """Yield *line* with its explanation: behind it if nft reads it and there is room, otherwise above it."""
    reason = line.explanation
    if line.text.startswith("#"):
        yield line.text
        yield from _comment(reason, "")
        return
    is_indented = line.text.startswith("\t")
    if reason and is_indented and len(line.text.expandtabs(_TAB)) + len(reason) + 4 <= _WIDTH:
        yield f"{line.text}  # {reason}"
        return
    if reason:
        yield from _comment(reason, line.text[: len(line.text) - len(line.text.lstrip("\t"))])
    yield line.text


def _comment(reason: str, indent: str) -> list[str]:
    width = _WIDTH - len(indent.expandtabs(_TAB)) - 2
    return [
        f"{indent}# {part}" for part in textwrap.wrap(reason, width, break_long_words=False, break_on_hyphens=False)
    ]


def as_json(found: Sequence[Explained]) -> str:
    """Return *found* as a list of {mode, language, words, lines: [{text, explanation, service}]}."""
    modes = [
        {
            "mode": mode.rendered.mode.name,
            "language": mode.rendered.language,
            "words": words_in(mode.lines),
            "lines": [line._asdict() for line in mode.lines],
        }
        for mode in found
    ]
    return json.dumps(modes, indent=2)
