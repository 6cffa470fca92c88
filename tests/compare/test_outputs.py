"""What is asked for as a file is written whole, or stays what it was."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from userspace_proxy.compare.outputs import output


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_a_file_is_what_it_was_until_it_is_written_whole(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    report.write_bytes(b"the last one")

    with output(report) as write:
        assert report.read_bytes() == b"the last one"
        write(b"the new one")

    assert report.read_bytes() == b"the new one"
    assert names_in(tmp_path) == ["report.html"]


@pytest.mark.parametrize("before", [b"the last one", None], ids=["there", "not there"])
def test_a_file_that_nothing_was_written_to_stays_as_it_was(tmp_path: Path, before: bytes | None) -> None:
    report = tmp_path / "report.html"
    if before is not None:
        report.write_bytes(before)

    with pytest.raises(KeyboardInterrupt), output(report):
        raise KeyboardInterrupt

    assert names_in(tmp_path) == ([] if before is None else ["report.html"])
    assert before is None or report.read_bytes() == before


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "report.html").symlink_to("there/report.html")

    with output(tmp_path / "report.html") as write:
        write(b"the new one")

    assert (tmp_path / "report.html").is_symlink()
    assert (tmp_path / "there" / "report.html").read_bytes() == b"the new one"


def test_a_file_that_is_a_mount_is_written_in_its_place(tmp_path: Path) -> None:
    for name in ("outside", "report.html"):
        (tmp_path / name).touch()
    subprocess.run(["mount", "--bind", tmp_path / "outside", tmp_path / "report.html"], check=True)
    try:
        with output(tmp_path / "report.html") as write:
            write(b"the new one")
    finally:
        subprocess.run(["umount", tmp_path / "report.html"], check=True)

    assert (tmp_path / "outside").read_bytes() == b"the new one"


def test_what_is_no_file_is_written_to_as_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)

    with output(tmp_path / "pipe") as write:
        write(b"the new one")

    assert os.read(reader, 100) == b"the new one"
    os.close(reader)


def test_a_folder_that_has_become_another_one_meanwhile_is_still_meant(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()

    with output(tmp_path / "run" / "report.html") as write:
        (tmp_path / "run").rename(tmp_path / "covered")
        (tmp_path / "run").mkdir()
        write(b"the new one")

    assert (tmp_path / "covered" / "report.html").read_bytes() == b"the new one"
    assert names_in(tmp_path / "run") == []


@pytest.mark.parametrize("name", ["missing/report.html", ""], ids=["in no folder", "a folder"])
def test_a_path_that_cannot_be_written_is_refused_before_anything_is_done(tmp_path: Path, name: str) -> None:
    with pytest.raises(OSError), output(tmp_path / name):
        pytest.fail("it was taken")

    assert names_in(tmp_path) == []
