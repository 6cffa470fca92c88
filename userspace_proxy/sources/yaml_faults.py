"""Explains faults in YAML text in plain words, with their line (from 0)."""

import re
from collections.abc import Iterator

import yaml

from userspace_proxy import api
from userspace_proxy.errors import ConfigError, Note
from userspace_proxy.sources.pasted import certain_sign, sign_in
from userspace_proxy.sources.yaml_values import UnreadableValue, compose

# Placeholders of Helm, Jinja, ERB and envsubst.
TEMPLATE = re.compile(r"\{\{|\{%|<%|\$\{")
_KEY = re.compile(r"\s*(?:- +)*([\w./-]+):(\s|$)")
# Only this many characters of a line are examined.
_ROW_MAX = 1_000
_NUMERIC_FIELDS = ("port", "targetPort", "nodePort", "containerPort", "timeoutSeconds")


# ---- broken YAML


def describe(text: str, error: yaml.YAMLError) -> tuple[int, ConfigError]:
    """Return the line of the mistake that caused *error*, and its explanation."""
    rows = [row[:_ROW_MAX] for row in text.splitlines()]
    line = min(line_of(text, error), max(len(rows) - 1, 0))
    row = rows[line] if rows else ""
    if html := html_error(text):
        return line, html
    field = _field(row)
    near = [at for at in (line, _context(error, ""), line - 1) if at is not None and 0 <= at < len(rows)]
    if any(TEMPLATE.search(rows[at]) for at in near):
        return line, template_note(field)
    if "\t" in row[: len(row) - len(row.lstrip())] and not text.lstrip().startswith("{"):  # JSON may use tabs
        return line, ConfigError("a tab is used for indentation", field=field, fix="indent with spaces")
    for at in near:
        if sign := sign_in(rows[at], _field(rows[at])):
            return at, sign
    if isinstance(error, UnreadableValue):
        return line, ConfigError(str(error.problem), field=field, fix=error.fix)
    if (found := certain_sign(text)) is not None:
        return found
    if (opened := _unclosed_quote(rows, error)) is not None:
        return opened, ConfigError("the quote is never closed", field=_field(rows[opened]), fix="close it in its line")
    if special := _special_sign(row, error):
        return line, _of_special_sign(special, field)
    if glued := _missing_space(rows, line, error):
        return glued
    seen = f" near {row.strip()[:60]!r}" if row.strip() else ""
    fix = "look at the indentation here and in the line above: keys of one mapping start in one column"
    if _context(error, "parsing a flow") is not None:
        fix = "close each '[' and '{', and write ',' between what is in them"
    return line, ConfigError(f"the YAML is broken{seen}: {_problem(error)}", field=field, fix=fix)


def line_of(text: str, error: yaml.YAMLError) -> int:
    """Return the line of *text* where parsing stopped with *error*."""
    if isinstance(error, yaml.reader.ReaderError):
        return text.count("\n", 0, error.position)
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    return mark.line if mark else 0


def template_note(field: str = "") -> Note:
    fix = "render it first, with 'helm template' for a chart"
    return Note("this is a template, not a manifest; it is skipped", field=field, fix=fix)


def html_error(text: str) -> ConfigError | None:
    """Return an error if *text* is HTML, else None."""
    start = text.lstrip("- \n\t")
    if start.startswith("<") and not start.startswith(("<<", "<%")):
        return ConfigError("this is HTML, not a manifest", fix="fetch the raw file, not the page that shows it")
    return None


def _problem(error: yaml.YAMLError) -> str:
    reason = getattr(error, "problem", None) or getattr(error, "reason", None) or error
    return str(reason).splitlines()[0]


def _field(row: str) -> str:
    key = _KEY.match(row)
    return key[1] if key else ""


def _context(error: yaml.YAMLError, words: str) -> int | None:
    """Return the line where libyaml's current construct began, if *words* occur in its description, else None."""
    mark = getattr(error, "context_mark", None)
    return mark.line if mark and words in (getattr(error, "context", None) or "") else None


def _unclosed_quote(rows: list[str], error: yaml.YAMLError) -> int | None:
    """Return the line of an opening quote that is closed only by another text's quote or not at all."""
    if (line := _context(error, "quoted scalar")) is not None and "unexpected" in _problem(error):
        return line
    mark = getattr(error, "problem_mark", None)
    if mark is None or mark.line >= len(rows):
        return None
    before = rows[mark.line][: mark.column].rstrip()
    quote = before[-1:]
    if quote not in ("'", '"') or not before.count(quote) % 2:
        return None
    return next((line for line in range(mark.line - 1, -1, -1) if rows[line].count(quote) % 2), None)


def _special_sign(row: str, error: yaml.YAMLError) -> str:
    """Return the YAML indicator that a value wrongly begins with, or "" if that is not the fault."""
    mark = getattr(error, "problem_mark", None)
    reason = _problem(error)
    if mark is None:
        return ""
    if "undefined alias" in reason or _context(error, "scanning an alias") is not None:
        return "*"
    if _context(error, "scanning an anchor") is not None:
        return "&"
    return row[mark.column : mark.column + 1] if "cannot start any token" in reason else ""


def _of_special_sign(sign: str, field: str) -> ConfigError:
    reason = {
        "*": "'*' stands for an undefined alias: what follows it would be the name of an anchor",
        "&": "'&' begins an anchor, which needs a name",
    }.get(sign, f"no value begins with {sign!r}")
    fix = "write a number" if field in _NUMERIC_FIELDS else "put the value in quotes"
    return ConfigError(reason, field=field, fix=fix)


def _missing_space(rows: list[str], line: int, error: yaml.YAMLError) -> tuple[int, ConfigError] | None:
    """Return the line near *line* that lacks the space after ':' or '-', and the error, or None.

    YAML often reports this fault in the following line.
    """
    above = next((index for index in range(line - 1, -1, -1) if rows[index].strip()), line)
    key = _context(error, "simple key")
    for index in (line if key is None else key, line, above):
        if index < len(rows) and (found := api.space_error(rows[index].strip())):
            return index, found
    return None


# ---- duplicate keys


def keys_that_stand_twice(text: str) -> tuple[list[int], list[tuple[int, ConfigError]]]:
    """Return the lines where a new object begins without a separator, and the other duplicate keys with their errors.

    *text* is one YAML document that can be parsed.
    """
    root = compose(text)
    begins = _lines_of_new_objects(root)
    return begins, [] if begins else list(_repeated_keys(root))


def _lines_of_new_objects(root: yaml.Node | None) -> list[int]:
    if not isinstance(root, yaml.MappingNode) or root.flow_style:
        return []
    lines = []
    seen: set[str] = set()
    for key, _ in root.value:
        if key.value in ("apiVersion", "kind") and key.value in seen and "metadata" in seen:
            lines.append(key.start_mark.line)
            seen = set()
        seen.add(key.value)
    return lines


def _repeated_keys(root: yaml.Node | None) -> Iterator[tuple[int, ConfigError]]:
    visited: set[int] = set()  # aliases repeat nodes that were visited
    waiting = [(root, "")]
    while waiting:
        node, field = waiting.pop()
        if node is None or id(node) in visited:
            continue
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += [(item, f"{field}[{index}]") for index, item in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            waiting += [(value, api.below(field, key.value)) for key, value in node.value]
            yield from _repeated_keys_of(node, field)


def _repeated_keys_of(node: yaml.MappingNode, field: str) -> Iterator[tuple[int, ConfigError]]:
    firsts: dict[str, yaml.Node] = {}
    for key, value in node.value:
        first = firsts.setdefault(key.value, key)
        is_merge = key.value == "<<" and not key.style
        if first is not key and not is_merge:
            lines = key.start_mark.line - first.start_mark.line
            yield key.start_mark.line, _repeated_key(api.below(field, key.value), key.value, lines, value)


def _repeated_key(field: str, key: str, lines: int, value: yaml.Node) -> ConfigError:
    reason = f"{key!r} stands twice, {lines} {'line' if lines == 1 else 'lines'} apart"
    fix = "remove one of them" if isinstance(value, yaml.ScalarNode) else "join the two"
    return ConfigError(f"{reason}, and only this one counts", field=field, fix=fix)
