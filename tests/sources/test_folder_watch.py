"""The watch of folders: it reports files once their writers are done, and knows which ones are being written."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from userspace_proxy.sources import folder_watch
from userspace_proxy.sources.folder_watch import ChangedFile, FolderWatch

PATIENCE_S = 10


@pytest.fixture
async def watch(tmp_path: Path) -> AsyncIterator[FolderWatch]:
    with FolderWatch([str(tmp_path)], lambda file: file.name.endswith(".yaml")) as made:
        yield made


def read(watch: FolderWatch, file: Path) -> str | None:
    found = file.stat()
    return watch.read(str(file), (found.st_dev, found.st_ino))


async def names(watch: FolderWatch) -> set[str]:
    return {file.name for file in await watch.changes(PATIENCE_S)}


async def test_a_file_is_read_and_reported_once_its_writer_has_closed_it(watch: FolderWatch, tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    with file.open("w") as writing:
        assert read(watch, file) is None  # created
        writing.write("half")
        writing.flush()
        assert read(watch, file) is None
    assert read(watch, file) == "half"

    assert await names(watch) == {"a.yaml"}
    assert read(watch, file) == "half"


async def test_a_text_is_dropped_if_its_file_was_written_and_closed_meanwhile(
    watch: FolderWatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.yaml"

    def read_half(path: str) -> str:
        half = Path(path).read_text()
        file.write_text(half + " rest")
        return half

    file.write_text("half")
    assert await names(watch) == {"a.yaml"}
    with monkeypatch.context() as patch:
        patch.setattr(folder_watch, "read", read_half)
        assert read(watch, file) is None

    assert await names(watch) == {"a.yaml"}
    assert read(watch, file) == "half rest"


async def test_a_file_that_is_renamed_while_it_is_written_is_reported_when_it_is_closed(
    watch: FolderWatch, tmp_path: Path
) -> None:
    file = tmp_path / "a.yaml"
    with file.open("w") as writing:
        writing.write("half")
        writing.flush()
        assert read(watch, file) is None
        file.rename(tmp_path / "b.yaml")
        assert await names(watch) == {"a.yaml"}
        assert read(watch, tmp_path / "b.yaml") is None

    assert await names(watch) == {"b.yaml"}
    assert read(watch, tmp_path / "b.yaml") == "half"


async def test_a_writer_of_a_file_that_was_replaced_disturbs_nobody(watch: FolderWatch, tmp_path: Path) -> None:
    file, new = tmp_path / "a.yaml", tmp_path / "new"
    with file.open("w", buffering=1) as writing:
        writing.write("old\n")
        new.write_text("new")
        new.replace(file)
        assert await names(watch) == {"a.yaml"}
        writing.write("more\n")
        assert read(watch, file) == "new"


async def test_a_text_is_dropped_if_another_file_took_its_place_meanwhile(
    watch: FolderWatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.yaml"

    def read_half_of_another(path: str) -> str:
        file.rename(tmp_path / "old")
        with file.open("w") as writing:
            writing.write("half")
            writing.flush()
            half = Path(path).read_text()
            writing.write(" rest")
        return half

    file.write_text("old")
    assert await names(watch) == {"a.yaml"}
    with monkeypatch.context() as patch:
        patch.setattr(folder_watch, "read", read_half_of_another)
        assert read(watch, file) is None

    assert await names(watch) == {"a.yaml"}
    assert read(watch, file) == "half rest"


async def test_a_file_that_is_linked_with_its_content_is_reported_though_it_is_never_closed(
    watch: FolderWatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_watch, "_LINKED_S", 0.0)
    (tmp_path / "new").write_text("text")
    (tmp_path / "a.yaml").hardlink_to(tmp_path / "new")
    (tmp_path / "new").unlink()

    assert await names(watch) == {"a.yaml"}
    assert read(watch, tmp_path / "a.yaml") == "text"


async def test_a_writer_whose_file_is_deleted_delays_no_later_file_of_the_same_inode(
    watch: FolderWatch, tmp_path: Path
) -> None:
    file, link, later = tmp_path / "a.yaml", tmp_path / "link", tmp_path / "b.yaml"
    with file.open("w", buffering=1) as writing:
        writing.write("text\n")
        assert read(watch, file) is None
        link.hardlink_to(file)
        file.unlink()
        assert await names(watch) == {"a.yaml"}
    link.rename(later)

    assert await names(watch) == {"b.yaml"}
    assert read(watch, later) == "text\n"


async def test_a_writer_that_began_before_its_folder_was_watched_anew_is_waited_for(
    watch: FolderWatch, tmp_path: Path
) -> None:
    file = tmp_path / "a.yaml"
    with file.open("w", buffering=1) as writing:
        writing.write("half\n")
        assert read(watch, file) is None
        with FolderWatch([str(tmp_path)], lambda _: True, watch) as later:
            assert read(later, file) is None
            writing.close()

            assert await names(later) == {"a.yaml"}
            assert read(later, file) == "half\n"


async def test_both_names_of_a_renamed_file_are_reported_together(watch: FolderWatch, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").touch()
    assert await names(watch) == {"a.yaml"}
    (tmp_path / "a.yaml").rename(tmp_path / "b.yaml")

    assert await names(watch) == {"a.yaml", "b.yaml"}


async def test_files_of_other_names_are_not_reported(watch: FolderWatch, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("text")
    assert not await watch.changes(PATIENCE_S)

    (tmp_path / "a.yaml").write_text("text")
    assert await names(watch) == {"a.yaml"}


async def test_a_steady_stream_of_changes_is_reported_while_it_flows(watch: FolderWatch, tmp_path: Path) -> None:
    is_reported = threading.Event()

    def write() -> None:
        while not is_reported.wait(0.001):
            for name in "ab":
                (tmp_path / f"{name}.yaml").write_text("text")

    writer = threading.Thread(target=write)
    writer.start()
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not await names(watch):  # both may be open at the moment
                pass
        assert writer.is_alive()
    finally:
        is_reported.set()
        writer.join()


async def test_a_watch_tells_that_a_folder_is_gone_though_another_one_has_its_place(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with FolderWatch([str(folder)], lambda _: True) as watch:
        assert not watch.has_lost_folder
        folder.rmdir()
        folder.mkdir()
        assert ChangedFile(str(folder), "") in await watch.changes(PATIENCE_S)

        assert watch.has_lost_folder


async def test_a_folder_that_is_removed_is_reported_without_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with FolderWatch([str(folder), str(tmp_path / "missing")], lambda _: True) as watch:
        folder.rename(tmp_path / "moved")

        assert ChangedFile(str(folder), "") in await watch.changes(PATIENCE_S)


@pytest.mark.parametrize("steps", range(8))
async def test_a_wait_that_is_cancelled_while_a_change_comes_in_ends(
    watch: FolderWatch, tmp_path: Path, steps: int
) -> None:
    waiting = asyncio.create_task(watch.changes(PATIENCE_S))
    await asyncio.sleep(0.01)
    (tmp_path / "log").write_text("an event")
    for _ in range(steps):
        await asyncio.sleep(0)
    waiting.cancel()

    await asyncio.wait({waiting}, timeout=PATIENCE_S)
    assert waiting.cancelled()
