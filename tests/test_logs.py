"""Log lines for people and for machines, and an access log that no client waits for."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from userspace_proxy.interfaces import AccessRecord
from userspace_proxy.logs import AccessLog, JsonFormatter, TextFormatter, configure_logging
from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.names import L4Protocol, NamespacedName, ServicePortName
from userspace_proxy.model.service import Portal

RECORD = AccessRecord(
    service_port=ServicePortName(NamespacedName("shop", "web"), "http", L4Protocol.TCP),
    client=("192.168.50.2", 40_000),
    portal=Portal("10.96.0.1", 80, L4Protocol.TCP),
    endpoint=Endpoint("10.244.0.2", 8080),
    why="next in turn",
    bytes_to_backend=75,
    bytes_to_client=1_234,
    duration_s=0.012_345_6,
    how="closed",
)
LOST = replace(RECORD, portal=None, endpoint=None, why="", client=("fd00::2", 1), how="no endpoint")


def log_record(message: str, *args: object, exc_info: Any = None) -> logging.LogRecord:
    return logging.LogRecord("userspace_proxy.app", logging.WARNING, "app.py", 1, message, args, exc_info)


def failure() -> Any:
    try:
        return 1 / 0
    except ZeroDivisionError:
        return sys.exc_info()


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    """The logging of this process, put back afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("userspace_proxy")
    before = root.handlers[:], root.level, ours.level
    yield root
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    ours.setLevel(before[2])


def written(path: Path, log_format: str, *records: AccessRecord) -> list[str]:
    access_log = AccessLog(str(path), log_format)
    for record in records:
        access_log.write(record)
    access_log.close()
    return path.read_text().splitlines()


# ---- the program's log


def test_a_line_of_json_is_one_object_that_says_all() -> None:
    line = json.loads(JsonFormatter().format(log_record("%s is ready", "web")))

    assert (line["level"], line["logger"], line["message"]) == ("warning", "app", "web is ready")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])


def test_a_traceback_is_in_the_same_line_of_json() -> None:
    text = JsonFormatter().format(log_record("failed", exc_info=failure()))

    assert "\n" not in text
    assert "ZeroDivisionError" in json.loads(text)["exception"]


@pytest.mark.parametrize("message", ['"quoted"\nnext line', "é 漢 \x00", os.fsdecode(b"web-\xff.yaml")])
def test_whatever_is_logged_is_one_line_of_json(message: str) -> None:
    text = JsonFormatter().format(log_record("%s", message))

    assert "\n" not in text
    assert json.loads(text)["message"] == message


def test_a_line_of_text_says_when_how_bad_and_what() -> None:
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3} WARNING 1 of 2", TextFormatter().format(log_record("%d of %d", 1, 2)))


def test_a_traceback_follows_the_line_of_text() -> None:
    text = TextFormatter().format(log_record("failed", exc_info=failure()))

    assert text.splitlines()[0].endswith("failed")
    assert text.splitlines()[-1] == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(("verbose", "shown"), [(False, ["info"]), (True, ["debug", "info"])])
def test_a_line_for_each_connection_is_shown_only_when_asked_for(
    root_logger: logging.Logger, capsys: pytest.CaptureFixture[str], verbose: bool, shown: list[str]
) -> None:
    configure_logging("json", verbose=verbose)

    logging.getLogger("userspace_proxy.x").debug("a connection")
    logging.getLogger("userspace_proxy.x").info("a change")
    logging.getLogger("aiohttp.access").info("not ours")

    assert [json.loads(line)["level"] for line in capsys.readouterr().err.splitlines()] == shown


# ---- the access log


def test_a_line_tells_who_asked_for_what_and_what_became_of_it(tmp_path: Path) -> None:
    (line,) = written(tmp_path / "access.log", "text", RECORD)

    assert line.split(" ", 1)[1] == (
        "shop/web:http TCP 192.168.50.2:40000 -> 10.96.0.1:80 -> 10.244.0.2:8080 (next in turn)"
        " up=75 down=1234 12.3ms closed"
    )


def test_what_is_not_known_is_a_dash(tmp_path: Path) -> None:
    (line,) = written(tmp_path / "access.log", "text", LOST)

    assert " [fd00::2]:1 -> - -> - (-) " in line


def test_a_line_of_json_tells_the_same(tmp_path: Path) -> None:
    known, lost = map(json.loads, written(tmp_path / "access.log", "json", RECORD, LOST))

    assert {**known, "time": ""} == {
        "time": "",
        "service": "shop/web",
        "port": "http",
        "protocol": "TCP",
        "client": "192.168.50.2:40000",
        "portal": "10.96.0.1:80",
        "endpoint": "10.244.0.2:8080",
        "why": "next in turn",
        "bytesToBackend": 75,
        "bytesToClient": 1234,
        "durationMs": 12.346,
        "end": "closed",
    }
    assert (lost["portal"], lost["endpoint"]) == (None, None)


def test_lines_are_in_the_order_of_their_ends_and_none_is_lost_at_the_end(tmp_path: Path) -> None:
    records = [replace(RECORD, bytes_to_backend=n) for n in range(2_000)]

    lines = written(tmp_path / "access.log", "json", *records)

    assert [json.loads(line)["bytesToBackend"] for line in lines] == list(range(2_000))


def test_a_log_that_was_moved_away_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    written(path, "text", RECORD)
    access_log = AccessLog(str(path), "text")
    access_log.write(RECORD)
    path.rename(tmp_path / "access.log.1")
    access_log.write(RECORD)
    access_log.close()

    assert len((tmp_path / "access.log.1").read_text().splitlines()) + len(path.read_text().splitlines()) == 3


def test_a_slow_disk_costs_lines_and_holds_up_nobody(tmp_path: Path) -> None:
    """The disk is a pipe that nobody reads yet. 20,000 lines fit neither there nor in the queue."""
    path = tmp_path / "access.log"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    access_log = AccessLog(str(path), "text")
    for _ in range(20_000):
        access_log.write(RECORD)
    dropped = access_log.dropped
    os.set_blocking(reader, True)
    lines: list[bytes] = []
    with os.fdopen(reader, "rb") as pipe:
        reading = threading.Thread(target=lambda: lines.extend(pipe))
        reading.start()
        access_log.close()
        reading.join(timeout=10)

    assert dropped > 0
    assert len(lines) == 20_000 - dropped


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(OSError, match="file"):
        AccessLog(str(tmp_path / "file" / "access.log"), "text")
