"""An output file is replaced as a whole, or keeps its content."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from userspace_proxy.compare.outputs import output


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_a_file_keeps_its_content_until_it_is_replaced(tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    report.write_bytes(b"the last one")

    with output(report) as write:
        assert report.read_bytes() == b"the last one"
        write(b"the new one")

    assert report.read_bytes() == b"the new one"
    assert names_in(tmp_path) == ["report.html"]


@pytest.mark.parametrize("before", [b"the last one", None], ids=["there", "not there"])
def test_a_file_is_unchanged_if_nothing_is_written(tmp_path: Path, before: bytes | None) -> None:
    report = tmp_path / "report.html"
    if before is not None:
        report.write_bytes(before)

    with pytest.raises(KeyboardInterrupt), output(report):
        raise KeyboardInterrupt

    assert names_in(tmp_path) == ([] if before is None else ["report.html"])
    assert before is None or report.read_bytes() == before


def test_a_link_is_kept(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "report.html").symlink_to("there/report.html")

    with output(tmp_path / "report.html") as write:
        write(b"the new one")

    assert (tmp_path / "report.html").is_symlink()
    assert (tmp_path / "there" / "report.html").read_bytes() == b"the new one"


def test_a_mounted_file_is_written_in_place(tmp_path: Path) -> None:
    for name in ("outside", "report.html"):
        (tmp_path / name).touch()
    subprocess.run(["mount", "--bind", tmp_path / "outside", tmp_path / "report.html"], check=True)
    try:
        with output(tmp_path / "report.html") as write:
            write(b"the new one")
    finally:
        subprocess.run(["umount", tmp_path / "report.html"], check=True)

    assert (tmp_path / "outside").read_bytes() == b"the new one"


def test_a_pipe_is_written_directly(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)

    with output(tmp_path / "pipe") as write:
        write(b"the new one")

    assert os.read(reader, 100) == b"the new one"
    os.close(reader)


def test_a_later_mount_over_the_folder_has_no_effect(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()

    with output(tmp_path / "run" / "report.html") as write:
        (tmp_path / "run").rename(tmp_path / "covered")
        (tmp_path / "run").mkdir()
        write(b"the new one")

    assert (tmp_path / "covered" / "report.html").read_bytes() == b"the new one"
    assert names_in(tmp_path / "run") == []


@pytest.mark.parametrize("name", ["missing/report.html", ""], ids=["in no folder", "a folder"])
def test_an_unwritable_path_is_refused_at_the_beginning(tmp_path: Path, name: str) -> None:
    with pytest.raises(OSError), output(tmp_path / name):
        pytest.fail("it was taken")

    assert names_in(tmp_path) == []
