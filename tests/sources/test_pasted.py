"""A mistake of copying is named with its line and its fix."""

from __future__ import annotations

import pytest

from tests.control.given import findings

SERVICE = """\
apiVersion: v1
kind: Service
metadata:
  name: web
spec:
  clusterIP: 10.96.0.9
  selector:
    app: web
  ports:
  - port: 80
    targetPort: 8080
---
apiVersion: v1
kind: Pod
metadata: {name: web-1, labels: {app: web}}
status: {podIP: 10.244.0.5}
"""
LOST = "".join(row.lstrip(" ") for row in SERVICE.partition("---")[0].splitlines(keepends=True))


def test_a_correct_text_has_no_sign_of_copying() -> None:
    assert findings(SERVICE) == []


@pytest.mark.parametrize(
    ("text", "line", "said", "fix"),
    [
        pytest.param(LOST, 4, "indentation is lost", "two spaces", id="lost indentation"),
        pytest.param(f"```yaml\n{SERVICE}```\n", 1, "Markdown fence", "remove the line", id="a fence"),
        pytest.param(f"```\n{LOST}```\n", 1, "Markdown fence", "remove the line", id="a fence and lost indentation"),
        pytest.param(SERVICE.partition("---")[0] + "```\n", 12, "Markdown fence", "remove", id="a fence at the end"),
        pytest.param(f"Write this:\n\n~~~yaml\n{SERVICE}", 3, "Markdown fence", "remove", id="a fence after words"),
        *(
            pytest.param(SERVICE.replace(old, new), line, said, fix, id=f"{said}: {new!r}")
            for line, old, new, said, fix in (
                (
                    1,
                    "apiVersion: v1\nkind: Service",
                    "$ cat web.yaml\napiVersion: v1\nkind: Service",
                    "shell command",
                    "remove",
                ),
                (10, "  - port", "  \u2013 port", "dash is a typographic one", "write '-'"),
                (6, "  clusterIP", "\u00a0\u00a0clusterIP", "non-breaking space", "again"),
                (11, "    target", "  \u00a0 target", "non-breaking space", "again"),
                (10, "port: 80\n", "port:\u00a080\n", "non-breaking space", "again"),
                (11, "    targetPort", "\u3000\u3000targetPort", "non-breaking space", "again"),
                (4, "name: web\n", "name: web\u200b\n", "invisible character", "again"),
                (10, "port: 80\n", "port\uff1a80\n", "full-width", "write ':'"),
                (6, "clusterIP: 1", "clusterIP\uff1a1", "full-width", "write ':'"),
                (2, "kind: Service", "kind\uff1aService", "full-width", "write ':'"),
                (4, "name: web\n", "name: \u201cweb\u201d\n", "typographic", "in their place"),
                (8, "app: web\n", "app: \u2018web\u2019\n", "typographic", "in their place"),
                (10, "port: 80\n", "port: \u201c80\u201d\n", "typographic", "in their place"),
                (10, "port: 80\n", "port: 80 // the web\n", "'//'", "'#'"),
                (4, "name: web\n", "name: web  // its name\n", "'//'", "'#'"),
                (9, "  ports:\n", "  // the ports\n  ports:\n", "'//'", "'#'"),
                (1, "apiVersion: v1\nkind: Service", "// a Service\napiVersion: v1\nkind: Service", "'//'", "'#'"),
                (2, "kind: Service", "kind: Service // a Service", "'//'", "'#'"),
                (4, "  name: web\n", "\u00a0 name: web\n", "non-breaking space", "again"),
                (4, "  name: web\n", "\u3000name: web\n", "non-breaking space", "again"),
                (
                    1,
                    "apiVersion: v1\nkind: Service",
                    "kubectl apply -f - <<EOF\napiVersion: v1\nkind: Service",
                    "shell",
                    "remove",
                ),
                (4, "name: web\n", "name: <span>web</span>\n", "HTML", "raw file"),
                (4, "name: web\n", "name: &quot;web&quot;\n", "HTML", "raw file"),
                (1, "apiVersion: v1\nkind: Service", "<pre>apiVersion: v1\nkind: Service", "HTML", "raw file"),
            )
        ),
        pytest.param(
            "apiVersion: v1 kind: Service metadata: name: web spec: ports: - port: 80\n",
            1,
            "line breaks",
            "raw",
            id="one line",
        ),
    ],
)
def test_a_copied_text_is_one_finding(text: str, line: int, said: str, fix: str) -> None:
    found = [finding for finding in findings(text) if finding.severity == "fault"]

    assert [(finding.line, said in finding.problem) for finding in found] == [(line, True)], found
    assert fix in found[0].fix


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  name: web\n", "  name: web\n  annotations: {a: '\u201cquoted\u201d // and\u00a0spaced\uff1a'}\n"),
        ("port: 80\n", "port: 80  # the \u201cweb\u201d // a comment\uff1a 80\n"),
    ],
)
def test_in_comments_and_annotations_anything_may_stand(old: str, new: str) -> None:
    assert findings(SERVICE.replace(old, new)) == []


def test_numbers_of_lines_that_were_copied_too_are_named() -> None:
    rows = SERVICE.partition("---")[0].splitlines()
    (found,) = findings("".join(f"{number:3}  {row}\n" for number, row in enumerate(rows, 1)))

    assert (found.severity, found.problem) == ("fault", "the lines are numbered")
