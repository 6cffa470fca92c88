"""Finds signs that a text was copied from a web page, a chat or a word processor; gives line and fix.

Only text that already has a fault is searched: in comments and annotations such signs do no harm.
"""

import re
from itertools import pairwise

from userspace_proxy.errors import ConfigError

FENCE = "a Markdown fence is not YAML"
# The number of a line, copied with what stands in it.
NUMBERED = re.compile(r"^\s*\d+[.:|]?\s+(apiVersion|kind|metadata|spec)\b")
_ROW_MAX = 1_000
_COMMENT = re.compile(r"(^|\s)#.*")
_TAG = r"</?(html|head|body|div|span|p|br|pre|code|a|table|t[rdh]|li|ul)(\s[^>]*)?/?>"
# Pattern in a line, problem, fix. A placeholder such as <name> is not HTML.
# A table. The formatter would make four lines of each entry.
# fmt: off
_SIGNS = [
    (re.compile(pattern, re.IGNORECASE), problem, fix)
    for pattern, problem, fix in (
        (r"^\s*(```|~~~)", FENCE, "remove the lines that begin with ``` or ~~~"),
        (rf"{_TAG}|&(nbsp|quot|amp|lt|gt|#\d+);", "this is HTML, not a manifest",
            "fetch the raw file, not the page that shows it"),
        ("[\u00a0\u2002-\u200a\u202f\u3000]", "there is a non-breaking space in the line, as web pages have them",
            "type its indentation and spaces again"),
        ("[\u200b-\u200f\u2060\ufeff]", "there is an invisible character in the line, as web pages have them",
            "type the line again"),
        ("^[^'\"]*\uff1a", "the colon '\uff1a' is a full-width one, which YAML does not read", "write ':' and a space"),
        ("[\u00ab\u00bb\u2018-\u201f\u2039\u203a]",
            "the quotes are typographic ones, which YAML takes as part of the text",
            "write ' or \" in their place, or none"),
        (r"^\s*(cat\s.*<<|kubectl\s)|^\$ |^EOF\s*$", "this is a shell command, not YAML", "remove the line"),
        (NUMBERED.pattern, "the lines are numbered", "copy the text without the numbers"),
        ("^\\s*[\u2013\u2014]\\s", "the dash is a typographic one, which YAML takes as part of the text", "write '-'"),
        (r"(^|\s)(//|/\*)", "'//' and '/*' begin no comment in YAML", "begin the comment with '#'"),
        (r"apiVersion: .*\bkind: .*\bmetadata:", "the line breaks are lost, as when a page is copied as one line",
            "copy the raw file"),
    )
]
# fmt: on
# Signs that are certain anywhere outside a multi-line text.
_CERTAIN = re.compile(
    f"{NUMBERED.pattern}|^\\$ |^\\s*(```|~~~|//|(?:- +)*[A-Za-z][\\w./-]*\uff1a)|^ *[\u00a0\u2002-\u200a\u202f\u3000]"
)
_PARENT = re.compile(r"(metadata|spec):\s*$")


def sign_in(row: str, field: str = "") -> ConfigError | None:
    """Return an error that names the sign of copying in *row*, a faulty line; None if there is no sign."""
    row = _COMMENT.sub("", row[:_ROW_MAX])
    return next((ConfigError(problem, field=field, fix=fix) for sign, problem, fix in _SIGNS if sign.search(row)), None)


def certain_sign(text: str) -> tuple[int, ConfigError] | None:
    """Return the first line of *text* (from 0) that copying has certainly broken, and the error, or None."""
    for line, row in enumerate(text.splitlines()):
        if _CERTAIN.match(row) and (error := sign_in(row)):
            return line, error
    return None


def lost_indentation(text: str) -> tuple[int, ConfigError] | None:
    """Return the line of *text* where indentation is missing, if all lines of an object begin in column one."""
    rows = [
        (line, row) for line, row in enumerate(text.splitlines()) if row.strip() and not row.startswith(("#", "---"))
    ]
    if any(row[0].isspace() for _, row in rows):
        return None
    for (_, above), (line, row) in pairwise(rows):
        if _PARENT.fullmatch(above) and not _PARENT.fullmatch(row):
            problem = "the indentation is lost: every line begins in the first column"
            fix = "indent what belongs under 'metadata' and 'spec' by two spaces, or copy the raw file"
            return line, ConfigError(problem, fix=fix)
    return None
