"""`get -w` prints a row again when it changes, and not because it grows older."""

from __future__ import annotations

import contextlib
import json
import socketserver
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from userspace_proxy.cli import ask, commands

Row = dict[str, Any]
CONNECTION: Row = {
    "service": "web",
    "protocol": "TCP",
    "client": "192.0.2.1:1000",
    "portal": "10.96.0.1:80",
    "endpoint": "10.244.0.2:8080",
}


@contextlib.contextmanager
def proxy_that_answers(path: Path, *answers: list[Row]) -> Iterator[None]:
    """Serve a control socket at *path* that gives one of *answers* after the other, and then an error."""
    left = iter(answers)

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            items = next(left, None)
            self.send_response(200 if items is not None else 404)
            self.end_headers()
            self.wfile.write(json.dumps({"error": "the end"} if items is None else {"items": items}).encode())

        def log_message(self, *_: object) -> None:
            pass

    with socketserver.UnixStreamServer(str(path), Answer) as server:
        serving = threading.Thread(target=server.serve_forever, args=(0.01,))
        serving.start()
        try:
            yield
        finally:
            server.shutdown()
            serving.join()


def endpoint(failed_ago_s: float, opened: int) -> Row:
    now = time.time()
    return {
        "service": "web",
        "port": "http",
        "address": "10.244.0.2:8080",
        "state": "ejected",
        "until": now - failed_ago_s + 60,
        "share": 1,
        "weight": 1,
        "open": opened,
        "pins": 0,
        "last_failure": "refused",
        "failed_at": now - failed_ago_s,
    }


def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, *answers: list[Row]) -> list[list[str]]:
    """Return the words of each line that `get -w` prints of *answers*, without the heads."""
    monkeypatch.setattr(ask, "_WATCH_EVERY_S", 0.0)
    path = tmp_path / "s"
    with proxy_that_answers(path, *answers):
        done = CliRunner().invoke(commands, ["get", kind, "-w", "--control-socket", str(path)])
    assert "the end" in done.output
    return [line.split() for line in done.output.splitlines()[1:-1]]


def test_a_connection_that_grows_older_is_not_printed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {**CONNECTION, "client": "192.0.2.1:1001", "age_s": 0.0}
    answers = [[{**CONNECTION, "age_s": age_s}] for age_s in (5.0, 6.0, 300.0)]
    lines = seen(tmp_path, monkeypatch, "connections", *answers, [*answers[-1], other])

    assert [(words[2], words[-1]) for words in lines] == [("192.0.2.1:1000", "5s"), ("192.0.2.1:1001", "0s")]


def test_an_endpoint_is_printed_again_when_more_than_its_ages_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [[endpoint(5, 0)], [endpoint(9, 0)], [endpoint(9, 1)]]
    lines = seen(tmp_path, monkeypatch, "endpoints", *answers)

    assert [words[6] for words in lines] == ["0", "1"], lines
