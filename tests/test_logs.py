"""Log lines for people and for machines, and an access log that no client waits for."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from userspace_proxy.logs import AccessLog, JsonFormatter, TextFormatter, configure_logging, flush_log, require_writable
from userspace_proxy.model.access_record import AccessRecord
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


def until(condition: Callable[[], object], what: str) -> None:
    give_up_at = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up_at, f"waited in vain until {what}"
        time.sleep(0.01)


def wrote(access_log: AccessLog) -> bool:
    access_log.write(RECORD)
    return True


def until_read(lines: list[str], text: str) -> None:
    until(lambda: any(text in line for line in lines), f"{text!r} is read")


def log_record(message: str, *args: object, exc_info: Any = None) -> logging.LogRecord:
    return logging.LogRecord("userspace_proxy.runtime.app", logging.WARNING, "app.py", 1, message, args, exc_info)


def failure() -> Any:
    try:
        return 1 / 0
    except ZeroDivisionError:
        return sys.exc_info()


@pytest.fixture
def root_logger(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """The logging of this process, put back afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("userspace_proxy")
    monkeypatch.setattr(sys, "stderr", sys.stderr)
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


def test_a_line_of_json_is_one_object_with_all_fields() -> None:
    line = json.loads(JsonFormatter().format(log_record("%s is ready", "web")))

    assert (line["level"], line["logger"], line["message"]) == ("warning", "runtime.app", "web is ready")
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


HOSTILE = "a\nb\x1b[31m\x07\u202ec\u2028d\x9be"


def test_text_of_others_stays_in_its_line_and_reaches_no_terminal() -> None:
    text = TextFormatter().format(log_record("%s is gone", HOSTILE))
    as_json = JsonFormatter().format(log_record("%s is gone", HOSTILE))

    assert text.isprintable()
    assert text.endswith(r"a\nb\x1b[31m\x07\u202ec\u2028d\x9be is gone")
    assert as_json.isprintable()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:secret@10.0.0.1:6443/x", "https://***@10.0.0.1:6443/x"),
        ("https://user:se@cret@host", "https://***@host"),
        ("https:/user:secret@host/x.yaml", "https:/***@host/x.yaml"),
        ("https://host:6443/x?access_token=secret&watch=1: refused", "https://host:6443/x?***: refused"),
        ("'https://host?token=se:c.ret', to be tried again", "'https://host?***', to be tried again"),
        ("https://host/?secret, http:/host/x.yaml?a=b?c", "https://host/?***, http:/host/x.yaml?***"),
        ("is it 10.0.0.1:80? a?b=c", "is it 10.0.0.1:80? a?b=c"),
        ("https://10.0.0.1:6443/a@b", "https://10.0.0.1:6443/a@b"),
    ],
)
def test_a_password_or_query_in_a_url_is_not_logged(url: str, shown: str) -> None:
    assert TextFormatter().format(log_record("following %s", url)).endswith(f"following {shown}")
    assert json.loads(JsonFormatter().format(log_record("following %s", url)))["message"] == f"following {shown}"


def test_a_long_message_is_shortened() -> None:
    assert len(TextFormatter().format(log_record("%s", "x" * 100_000))) < 4_100


def test_a_line_of_text_has_time_level_and_message() -> None:
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3} WARNING 1 of 2", TextFormatter().format(log_record("%d of %d", 1, 2)))


def test_a_traceback_follows_the_line_of_text() -> None:
    text = TextFormatter().format(log_record("failed", exc_info=failure()))

    assert text.splitlines()[0].endswith("failed")
    assert text.splitlines()[-1] == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(("verbose", "shown"), [(False, ["info"]), (True, ["debug", "info"])])
def test_a_line_for_each_connection_is_shown_only_when_asked_for(
    root_logger: logging.Logger, capfd: pytest.CaptureFixture[str], verbose: bool, shown: list[str]
) -> None:
    configure_logging("json", verbose=verbose)

    logging.getLogger("userspace_proxy.x").debug("a connection")
    logging.getLogger("userspace_proxy.x").info("a change")
    logging.getLogger("aiohttp.access").info("not ours")

    flush_log()
    assert [json.loads(line)["level"] for line in capfd.readouterr().err.splitlines()] == shown


def test_a_blocked_stderr_delays_no_caller_and_the_last_lines_follow_later() -> None:
    """In a separate process, because its exit is tested: three thousand lines do not fit into a pipe."""
    code = (
        "import sys, logging; from userspace_proxy.logs import configure_logging, log_lines_dropped;"
        "configure_logging('text'); log = logging.getLogger('userspace_proxy.x');"
        "[log.warning('%d %s', n, '.' * 100) for n in range(30_000)];"
        "print(log_lines_dropped(), flush=True); sys.stdin.readline();"
        "log.warning('goodbye'); raise ValueError('the end')"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        dropped = int(process.stdout.readline())  # though nobody has read its stderr
        lines: list[str] = []
        reading = threading.Thread(target=lambda stderr=process.stderr: lines.extend(stderr))
        reading.start()
        until_read(lines, "log lines dropped")
        process.stdin.write("\n")
        process.stdin.close()
        reading.join(timeout=20)
        process.wait(20)

    assert dropped > 10_000
    assert sum(".....\n" in line for line in lines) == 30_000 - dropped
    assert [line.split()[-1] for line in lines if "log lines dropped" in line] == [str(dropped)]
    assert "goodbye" in "".join(lines)
    assert lines[-1] == "ValueError: the end\n"


def test_a_process_ends_although_its_output_is_blocked() -> None:
    code = (
        "import logging; from userspace_proxy.logs import configure_logging; configure_logging('text');"
        "[logging.getLogger('userspace_proxy.x').warning('%s', '.' * 1000) for _ in range(100)]; raise SystemExit(3)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) as process:
        assert process.wait(20) == 3


def test_a_closed_stderr_is_no_other_descriptor() -> None:
    """The next opened file gets its number."""
    code = (
        "import sys, logging; other = open(sys.argv[1], 'w'); from userspace_proxy.logs import configure_logging;"
        "configure_logging('text'); logging.getLogger('userspace_proxy.x').warning('astray'); other.write('its own')"
    )
    with tempfile.NamedTemporaryFile() as file:
        command = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", code, file.name]
        subprocess.run(command, check=True, timeout=20)

        assert file.read() == b"its own"


# ---- the access log


def test_a_line_has_client_destination_and_outcome(tmp_path: Path) -> None:
    (line,) = written(tmp_path / "access.log", "text", RECORD)

    assert line.split(" ", 1)[1] == (
        "shop/web:http TCP 192.168.50.2:40000 -> 10.96.0.1:80 -> 10.244.0.2:8080 (next in turn)"
        " up=75 down=1234 12.3ms closed"
    )


def test_an_unknown_value_is_a_dash(tmp_path: Path) -> None:
    (line,) = written(tmp_path / "access.log", "text", LOST)

    assert " [fd00::2]:1 -> - -> - (-) " in line


def test_a_line_of_json_has_the_same_content(tmp_path: Path) -> None:
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


def test_a_slow_disk_costs_lines_and_delays_no_caller(tmp_path: Path) -> None:
    """The disk is a pipe without a reader. 20,000 lines fit neither into it nor into the queue."""
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
        require_writable(str(tmp_path / "file" / "access.log"))


def test_a_log_whose_folder_moves_is_warned_of_once_counted_and_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    path = folder / "access.log"
    access_log = AccessLog(str(path), "text")
    access_log.write(RECORD)
    until(lambda: path.exists() and path.read_text(), "the first line is there")
    folder.rename(tmp_path / "moved")
    for _ in range(3):
        access_log.write(RECORD)
    until(lambda: access_log.dropped == 3, "they are dropped")
    folder.mkdir()

    until(lambda: wrote(access_log) and "written again" in caplog.text, "it is written again")
    access_log.close()

    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"access log {path} is not written, lines are dropped: No such file or directory",
        f"access log {path} is written again; lines dropped: 3",
    ]
    assert access_log.dropped == 3


def test_a_full_disk_tears_no_line_in_two(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(tmp_path)], check=True)
    try:
        path, ballast = tmp_path / "access.log", tmp_path / "ballast"
        access_log = AccessLog(str(path), "json")
        for _ in range(200):
            access_log.write(RECORD)
        until(lambda: access_log.dropped, "the disk is full")
        access_log._writer.flush()
        path.rename(ballast)
        whole = ballast.read_text().count("\n")
        ballast.unlink()

        until(lambda: wrote(access_log) and "written again" in caplog.text, "there is room again")
        access_log.close()

        assert access_log.dropped + whole == 200
        assert [json.loads(line)["end"] for line in path.read_text().splitlines()]
        assert caplog.text.count("is not written") == 1
        assert "Traceback" not in caplog.text
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_log_that_takes_nothing_is_given_up_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    access_log = AccessLog(str(path), "text")
    for _ in range(20_000):
        access_log.write(RECORD)

    begun_at = time.monotonic()
    access_log.close()

    assert time.monotonic() - begun_at < 20, "it ends, though nobody reads"
    os.close(reader)


def test_a_fifo_without_a_reader_blocks_no_other_work(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    os.mkfifo(path)
    require_writable(str(path))
    access_log = AccessLog(str(path), "text")
    access_log.write(RECORD)
    until(lambda: access_log.dropped == 1, "the line is dropped")

    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as reader:
        access_log.write(RECORD)
        access_log.close()
        assert reader.read().count(b"\n") == 1
