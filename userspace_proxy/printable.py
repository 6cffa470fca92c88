"""Make text from outside safe to print: one line, no escape sequences, no secret in a URL. Pure."""

import re
import unicodedata

# Control and format characters (escape sequences, direction marks), surrogates, line and paragraph separators.
_UNPRINTABLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
# A path that was a URL has one slash there.
_USER_INFO = re.compile(r"(?<=:/)(/?)[^/\s'\"]*@")
# A word, and behind its question mark the rest of the word, without punctuation at its end. In linear time.
_QUERY = re.compile(r"(?<![^\s'\"?])([^\s'\"?]++)\?[^\s'\"]*[^\s'\":,.;)\]]")
_SHORTENED = "... ({} characters)"


def brief(text: str, most: int = 0) -> str:
    """Return *text* with users, passwords and queries in URLs masked, cut to *most* characters; 0 does not cut.

    A query is masked as a whole: no list knows every name that a secret has.
    """
    if "@" in text:
        text = _USER_INFO.sub(r"\1***@", text)
    if "?" in text and ":/" in text:
        text = _QUERY.sub(lambda found: f"{found[1]}?***" if ":/" in found[1] else found[0], text)
    return text[:most] + _SHORTENED.format(len(text)) if most and len(text) > most else text


def printable(text: str, most: int = 0) -> str:
    """Return *text* as `brief` does, with unprintable characters escaped as in Python.

    For example ``\\n``, ``\\x1b`` and ``\\u202e``.
    """
    text = brief(text, most)
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_escaped, text))


def _escaped(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) not in _UNPRINTABLE:
        return character
    return character.encode("unicode_escape").decode()
