"""The contract of every Source, tested with real manifest files, changed as people and the kubelet change them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import pytest

from userspace_proxy import api
from userspace_proxy.api.events import EventType, ObjectEvent
from userspace_proxy.errors import StartError
from userspace_proxy.sources import files, folder_watch
from userspace_proxy.sources.files import FileSource

PATIENCE_S = 10


def service(name: str, port: int = 80, namespace: str = "default") -> str:
    return (
        "---\napiVersion: v1\nkind: Service\n"
        f"metadata:\n  name: {name}\n  namespace: {namespace}\n"
        f"spec:\n  ports:\n  - port: {port}\n"
    )


BROKEN = "---\nkind: Service\nmetadata:\n  name: broken\n spec: {}\n"


class Told:
    """Follows a source and records its events."""

    def __init__(self, source: FileSource) -> None:
        self.source = source
        self.events: list[ObjectEvent] = []
        self.ports: dict[str, int] = {}
        self.states: list[dict[str, int]] = []  # the ports after each batch
        self._reported = asyncio.Event()

    async def follow(self) -> None:
        async with contextlib.aclosing(self.source.events()) as batches:
            async for batch in batches:
                for event in batch:
                    self._take(event)
                self.states.append(dict(self.ports))
                self._reported.set()

    def _take(self, event: ObjectEvent) -> None:
        self.events.append(event)
        if event.type is EventType.DELETE and event.name:
            del self.ports[event.name.name]
        elif isinstance(event.object, api.Service) and event.name and event.object.spec and event.object.spec.ports:
            self.ports[event.name.name] = event.object.spec.ports[0].port

    @property
    def synced(self) -> int:
        return [event.type for event in self.events].count(EventType.SYNCED)

    def wake(self) -> None:
        self._reported.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await self._reported.wait()
                self._reported.clear()

    def since(self, mark: int) -> list[tuple[EventType, str]]:
        return [(event.type, event.name.name if event.name else "") for event in self.events[mark:]]


@contextlib.asynccontextmanager
async def following(*paths: Path | str, source: FileSource | None = None) -> AsyncIterator[Told]:
    told = Told(source or FileSource([str(path) for path in paths]))
    task = asyncio.create_task(told.follow())
    task.add_done_callback(lambda _: told.wake())
    try:
        await told.until(lambda: told.synced > 0 or task.done())
        if task.done():
            task.result()  # raises what ended it
        yield told
    finally:
        task.cancel()
        (ended,) = await asyncio.gather(task, return_exceptions=True)
    assert isinstance(ended, asyncio.CancelledError), ended


def put_in_place(path: Path, text: str) -> None:
    """Write as careful editors do: a new file, renamed over the old one."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text)
    beside.replace(path)


# ---- the start


async def test_every_object_is_reported_once_before_synced(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(service("a") + service("b"))
    (tmp_path / "b.yml").write_text(service("c"))
    (tmp_path / "c.json").write_text(
        json.dumps({"kind": "Service", "metadata": {"name": "d"}, "spec": {"ports": [{"port": 1}]}})
    )

    async with following(tmp_path) as told:
        assert told.since(0) == [*((EventType.SET, name) for name in "abcd"), (EventType.SYNCED, "")]


async def test_synced_is_reported_once(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(service("a"))

    async with following(file) as told:
        file.write_text(service("a", 81))
        await told.until(lambda: told.ports["a"] == 81)

        assert told.synced == 1


async def test_an_empty_folder_is_synced_too_and_its_first_file_is_seen(tmp_path: Path) -> None:
    async with following(tmp_path) as told:
        assert told.ports == {}

        (tmp_path / "a.yaml").write_text(service("a"))
        await told.until(lambda: told.ports == {"a": 80})


async def test_more_objects_than_a_batch_holds_all_come_before_synced(tmp_path: Path) -> None:
    file = tmp_path / "many.yaml"
    file.write_text("".join(service(f"s{index}") for index in range(2_100)))

    async with following(file) as told:
        assert len(told.ports) == 2_100
        assert told.since(-1) == [(EventType.SYNCED, "")]


@pytest.mark.parametrize("kind", ["List", "ServiceList"])
async def test_the_items_of_a_list_are_objects_of_their_own(tmp_path: Path, kind: str) -> None:
    item: dict[str, object] = {"metadata": {"name": "a"}, "spec": {"ports": [{"port": 80}]}}
    if kind == "List":
        item["kind"] = "Service"
    (tmp_path / "a.json").write_text(json.dumps({"kind": kind, "items": [item]}))

    async with following(tmp_path) as told:
        assert told.ports == {"a": 80}


@pytest.fixture
def to_stdin(monkeypatch: pytest.MonkeyPatch) -> Iterator[BinaryIO]:
    """Give the test an open pipe as stdin, and the end that writes to it."""
    reader, writer = os.pipe()
    with os.fdopen(reader) as stdin, os.fdopen(writer, "wb", buffering=0) as to_stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield to_stdin


async def test_stdin_is_read_once(to_stdin: BinaryIO) -> None:
    to_stdin.write(service("a").replace("\n", "\r\n").encode("utf-8-sig"))
    to_stdin.close()

    async with following("-") as told:
        assert told.ports == {"a": 80}
        assert told.events[0].origin is not None
        assert told.events[0].origin.where("spec.ports") == "stdin:8"


async def test_nothing_is_synced_before_stdin_has_ended_and_the_loop_runs_on_meanwhile(
    tmp_path: Path, to_stdin: BinaryIO
) -> None:
    (tmp_path / "a.yaml").write_text(service("a"))
    told = Told(FileSource([str(tmp_path), "-"]))
    task = asyncio.create_task(told.follow())
    to_stdin.write(service("b").encode())
    done, _ = await asyncio.wait([task], timeout=0.05)
    assert not done
    assert not told.events

    to_stdin.close()
    await told.until(lambda: told.synced > 0)
    assert told.ports == {"a": 80, "b": 80}

    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_cancelled_and_restarted_source_loses_no_input_of_stdin(to_stdin: BinaryIO) -> None:
    source = FileSource(["-"])
    to_stdin.write(service("a").encode())
    for _ in range(2):
        events = source.events()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(events), 0.05)
    to_stdin.write(service("b").encode())
    to_stdin.close()

    async with following(source=source) as told:
        assert told.ports == {"a": 80, "b": 80}


def test_a_process_ends_well_while_stdin_is_still_open() -> None:
    program = (
        "import asyncio, contextlib\n"
        "from userspace_proxy.sources.files import FileSource\n"
        "async def main():\n"
        "    with contextlib.suppress(TimeoutError):\n"
        "        await asyncio.wait_for(anext(FileSource(['-']).events()), 0.1)\n"
        "asyncio.run(main())\n"
        "print('ended')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            code = process.wait(PATIENCE_S)
        finally:
            process.kill()
        assert (code, process.stdout.read(), process.stderr.read()) == (0, b"ended\n", b"")


async def test_stdin_that_is_no_text_is_reported_and_stops_no_file(tmp_path: Path, to_stdin: BinaryIO) -> None:
    (tmp_path / "a.yaml").write_text(service("a"))
    to_stdin.write(b"a: b\n\xff\n")
    to_stdin.close()

    async with following("-", tmp_path) as told:
        assert told.ports == {"a": 80}
        assert list(told.source.problems) == ["stdin:2"]


async def test_a_large_file_is_read_beside_the_event_loop(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("".join(service(f"s{number}") for number in range(3_000)))
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.005)
            ticks += 1

    ticking = asyncio.create_task(tick())
    async with following(tmp_path) as told:
        ticking.cancel()
        assert len(told.ports) == 3_000
        assert ticks > 3


async def test_a_source_cancelled_during_a_read_reports_all_the_next_time(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("".join(service(f"s{number}") for number in range(1_000)))
    source = FileSource([str(tmp_path)])
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(anext(source.events()), 0.01)

    async with following(source=source) as told:
        assert len(told.ports) == 1_000


async def test_a_document_over_a_bound_harms_no_other(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(service("a") + "---\n" + "- " * 30_000 + "\n" + service("b"))

    async with following(tmp_path) as told:
        assert sorted(told.ports) == ["a", "b"]
        assert len(told.source.problems) == 1


async def test_a_file_of_too_many_documents_is_refused_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("---\na\n" * 100_001)
    (tmp_path / "b.yaml").write_text(service("b"))

    async with following(tmp_path) as told:
        assert list(told.ports) == ["b"]
        (problem,) = told.source.problems.values()
        assert "more than 100000 documents" in problem


async def test_a_pipe_that_is_named_at_the_start_is_read_once(tmp_path: Path) -> None:
    """As a shell makes one of ``run <(command)``."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=[service("a")])
    writer.start()

    async with following(pipe) as told:
        writer.join(PATIENCE_S)
        assert told.ports == {"a": 80}
        assert not told.source.problems


def test_a_device_is_refused_at_once() -> None:
    with pytest.raises(StartError, match="/dev/null: neither a file, a folder nor a pipe"):
        FileSource(["/dev/null"])


async def test_kinds_that_a_proxy_does_not_read_are_named_once_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    deployment = "---\nkind: Deployment\nmetadata: {name: x}\n"
    (tmp_path / "a.yaml").write_text(deployment + service("a") + deployment)

    async with following(tmp_path) as told:
        assert told.ports == {"a": 80}
        assert caplog.text.count("kind Deployment is skipped") == 1
        assert not told.source.problems


def test_a_path_that_names_nothing_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="no such file or folder"):
        FileSource([str(tmp_path / "nothing.yaml")])


# ---- changes


async def test_an_unchanged_object_is_not_reported_again(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(service("a") + service("b"))

    async with following(file) as told:
        mark = len(told.events)
        file.write_text(service("a") + service("b", 81))
        await told.until(lambda: told.ports["b"] == 81)

        assert told.since(mark) == [(EventType.SET, "b")]


async def test_an_object_that_only_moved_is_not_reported_again_and_is_found_at_its_new_line(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(service("a") + service("b"))

    async with following(file) as told:
        mark = len(told.events)
        file.write_text("# a\n# few\n# words\n" + service("new") + service("b") + service("a"))
        await told.until(lambda: "new" in told.ports)

        assert told.since(mark) == [(EventType.SET, "new")]


async def test_a_file_that_an_editor_puts_in_place_of_the_old_one_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(service("a"))

    async with following(file) as told:
        for port in (81, 82):
            put_in_place(file, service("a", port))
            await told.until(lambda port=port: told.ports["a"] == port)  # type: ignore[misc]


def mounted(folder: Path, version: int, text: str) -> None:
    """Write a ConfigMap volume as kubelet does: a folder for each version, and a link that is swapped."""
    data = folder / f"..{version}"
    data.mkdir()
    (data / "svc.yaml").write_text(text)
    (folder / "..new").symlink_to(data.name)
    before = (folder / "..data").resolve() if (folder / "..data").exists() else None
    (folder / "..new").replace(folder / "..data")
    if before:
        shutil.rmtree(before)
    else:
        (folder / "svc.yaml").symlink_to("..data/svc.yaml")


@pytest.mark.parametrize("given", [".", "svc.yaml"])
async def test_a_config_map_that_is_swapped_is_seen(tmp_path: Path, given: str) -> None:
    mounted(tmp_path, 1, service("a", 1))

    async with following(tmp_path / given) as told:
        for version in (2, 3):
            mounted(tmp_path, version, service("a", version))
            await told.until(lambda version=version: told.ports["a"] == version)  # type: ignore[misc]

        assert (EventType.DELETE, "a") not in told.since(0)


async def test_a_change_behind_a_link_that_leads_elsewhere_is_seen(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (elsewhere / "real.yaml").write_text(service("a"))
    (folder / "a.yaml").symlink_to(elsewhere / "real.yaml")

    async with following(folder) as told:
        (elsewhere / "real.yaml").write_text(service("a", 81))
        await told.until(lambda: told.ports["a"] == 81)


async def test_an_object_that_is_taken_out_of_a_file_is_deleted(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(service("a") + service("b"))

    async with following(file) as told:
        file.write_text(service("b"))
        await told.until(lambda: told.ports == {"b": 80})


async def test_a_file_that_is_deleted_from_a_folder_takes_its_objects_along(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(service("a"))
    (tmp_path / "b.yaml").write_text(service("b"))

    async with following(tmp_path) as told:
        (tmp_path / "a.yaml").unlink()
        await told.until(lambda: told.ports == {"b": 80})
        assert not told.source.problems


async def test_an_object_that_moves_from_one_file_to_another_is_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(service("a"))

    async with following(tmp_path) as told:
        (tmp_path / "a.yaml").rename(tmp_path / "b.yaml")
        (tmp_path / "c.yaml").write_text(service("c"))
        await told.until(lambda: "c" in told.ports)

        assert told.ports == {"a": 80, "c": 80}
        assert (EventType.DELETE, "a") not in told.since(0)


# ---- breaks: the last good version goes on


async def test_a_broken_document_keeps_what_it_held_and_stops_no_other(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(service("a") + service("b"))

    async with following(file) as told:
        file.write_text(service("a").replace("spec:", " spec:") + service("b", 81))
        await told.until(lambda: told.ports["b"] == 81)

        assert told.ports == {"a": 80, "b": 81}
        ((where, said),) = told.source.problems.items()
        assert where == f"{file}:7"
        assert "indentation" in said

        file.write_text(service("a", 82) + service("b", 81))
        await told.until(lambda: told.ports["a"] == 82)
        assert not told.source.problems


async def test_a_document_that_is_broken_from_the_start_is_reported_and_stops_no_other(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(BROKEN + service("a"))
    (tmp_path / "b.yaml").write_text(service("b"))

    async with following(tmp_path) as told:
        assert told.ports == {"a": 80, "b": 80}
        assert list(told.source.problems) == [f"{tmp_path}/a.yaml:5"]


async def test_a_file_that_cannot_be_read_keeps_its_objects_and_stops_no_other(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(service("a"))
    (tmp_path / "b.yaml").write_text(service("b"))

    async with following(tmp_path) as told:
        (tmp_path / "a.yaml").write_bytes(b"\xff\xfe broken")
        put_in_place(tmp_path / "b.yaml", service("b", 81))
        await told.until(lambda: told.ports["b"] == 81)
        assert told.ports == {"a": 80, "b": 81}

        (tmp_path / "a.yaml").write_text(service("a", 82))
        await told.until(lambda: told.ports["a"] == 82)
        assert not told.source.problems


async def test_a_file_that_the_system_refuses_to_read_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").symlink_to("/proc/self/mem")  # exists, and fails when it is read
    (tmp_path / "b.yaml").write_text(service("b"))

    async with following(tmp_path) as told:
        assert told.ports == {"b": 80}
        assert "cannot be read" in told.source.problems[f"{tmp_path}/a.yaml"]


async def test_a_pipe_in_place_of_a_file_is_reported_and_never_waited_for(tmp_path: Path) -> None:
    file, other = tmp_path / "a.yaml", tmp_path / "b.yaml"
    file.write_text(service("a"))
    other.write_text(service("b"))

    async with following(file, other) as told:
        file.unlink()
        os.mkfifo(file)
        put_in_place(other, service("b", 81))
        await told.until(lambda: told.ports["b"] == 81)
        assert told.ports == {"a": 80, "b": 81}
        assert "not a regular file" in told.source.problems[str(file)]

        put_in_place(file, service("a", 82))
        await told.until(lambda: told.ports["a"] == 82)
        assert not told.source.problems


async def test_a_file_of_a_size_that_no_manifest_has_is_reported_and_not_read(tmp_path: Path) -> None:
    with (tmp_path / "a.yaml").open("w") as file:
        file.truncate(300 * 1024 * 1024)
    (tmp_path / "b.yaml").write_text(service("b"))

    async with following(tmp_path) as told:
        assert told.ports == {"b": 80}
        assert "larger than 256 MB" in told.source.problems[f"{tmp_path}/a.yaml"]


@pytest.mark.usefixtures("looks_once")
async def test_a_file_whose_name_is_no_text_is_reported_and_changes_are_seen_all_the_same(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(service("a"))

    async with following(tmp_path) as told:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.yaml")).write_text(service("b"))
        for port in (81, 82):
            put_in_place(file, service("a", port))
            await told.until(lambda port=port: told.ports["a"] == port)  # type: ignore[misc]

        assert told.ports == {"a": 82}
        assert told.source.problems == {
            f"{tmp_path}/\\xff.yaml": f"{tmp_path}/\\xff.yaml: cannot be read: its name is not UTF-8 text; rename it"
        }


async def test_a_link_that_leads_to_itself_is_reported_and_a_file_in_its_place_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(service("a"))
    source = FileSource([str(file)])
    file.unlink()
    file.symlink_to(file)

    async with following(source=source) as told:
        assert list(source.problems) == [str(file)]

        put_in_place(file, service("a", 81))
        await told.until(lambda: told.ports == {"a": 81})


async def test_without_its_watch_a_source_fails_and_does_not_go_on_blindly(tmp_path: Path) -> None:
    events = FileSource([str(tmp_path)]).events()
    await anext(events)
    (watch,) = [task for task in asyncio.all_tasks() if task.get_name() == "watch files"]
    watch.cancel()

    with pytest.raises(RuntimeError, match="watched no more"):
        await asyncio.wait_for(anext(events), PATIENCE_S)


async def test_a_folder_that_is_away_for_a_while_keeps_its_objects(tmp_path: Path) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other.yaml"
    folder.mkdir()
    (folder / "a.yaml").write_text(service("a"))
    other.write_text(service("b"))

    async with following(folder, other) as told:
        folder.rename(tmp_path / "away")
        other.write_text(service("b", 81))
        await told.until(lambda: told.ports["b"] == 81)
        assert told.ports["a"] == 80

        (tmp_path / "away" / "a.yaml").write_text(service("a", 82))
        (tmp_path / "away").rename(folder)
        await told.until(lambda: told.ports["a"] == 82)


async def test_of_an_object_that_stands_twice_the_first_counts_and_the_second_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(service("a", 1))
    (tmp_path / "b.yaml").write_text(service("a", 2))

    async with following(tmp_path) as told:
        assert told.ports == {"a": 1}
        assert f"already at {tmp_path}/a.yaml:5" in told.source.problems[f"{tmp_path}/b.yaml:5"]

        (tmp_path / "a.yaml").unlink()
        await told.until(lambda: told.ports == {"a": 2})
        assert (EventType.DELETE, "a") not in told.since(0)
        assert not told.source.problems


async def test_of_an_object_that_stands_twice_the_first_file_by_name_counts_whichever_came_first(
    tmp_path: Path,
) -> None:
    (tmp_path / "b.yaml").write_text(service("a", 2))

    async with following(tmp_path) as told:
        (tmp_path / "a.yaml").write_text(service("a", 1))
        await told.until(lambda: told.ports == {"a": 1})
        assert f"already at {tmp_path}/a.yaml:5" in told.source.problems[f"{tmp_path}/b.yaml:5"]


async def test_a_file_of_another_tool_is_no_problem_and_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "values.yaml").write_text("replicaCount: 1\n")
    (tmp_path / "web.yaml").write_text("{{- if .Values.on }}\nkind: Service\n{{- end }}\n---\n" + service("a"))

    async with following(tmp_path) as told:
        assert told.ports == {"a": 80}
        assert not told.source.problems


async def test_a_document_of_another_tool_keeps_no_deleted_object_alive(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    values = "---\nreplicaCount: 1\n"
    file.write_text(service("a") + service("b") + values)

    async with following(tmp_path) as told:
        assert told.ports == {"a": 80, "b": 80}
        file.write_text(service("b") + values)
        await told.until(lambda: told.ports == {"b": 80})


def several_ways(folder: Path) -> Sequence[str]:
    return [str(folder), f"{folder}/", f"{folder}/a.yaml", f"{folder}/./a.yaml"]


async def test_a_file_that_is_named_in_several_ways_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(service("a"))

    async with following(*several_ways(tmp_path)) as told:
        assert told.since(0) == [(EventType.SET, "a"), (EventType.SYNCED, "")]
        assert not told.source.problems


@pytest.mark.parametrize("seed", range(40))
def test_after_any_edits_the_reported_objects_are_those_of_a_fresh_reader(tmp_path: Path, seed: int) -> None:
    """Only the difference is parsed again; the result must equal that of parsing all, before and behind a change."""
    chance = random.Random(seed)
    file = tmp_path / "a.yaml"
    documents = [(number, 80) for number in range(8)]
    told: dict[str, object] = {}
    file.write_text("---\n".join(_numbered(*document) for document in documents))
    source = FileSource([str(tmp_path)])
    for turn in range(10):
        for event in source._read():
            assert event.name is not None
            if event.type is EventType.SET:
                told[event.name.name] = event.object
            else:
                del told[event.name.name]
        match chance.randrange(4):
            case 0:
                documents.insert(chance.randrange(len(documents) + 1), (chance.randrange(12), turn + 1))
            case 1 if documents:
                documents.pop(chance.randrange(len(documents)))
            case 2 if documents:
                documents[chance.randrange(len(documents))] = (chance.randrange(12), turn + 1)
            case _:
                chance.shuffle(documents)
        comment = "# a comment\n" * chance.randrange(2)
        separator = chance.choice(["---\n", "---\n# a document of words alone\n---\n"])
        file.write_text(comment + separator.join(_numbered(*document) for document in documents) or "# nothing\n")
        os.utime(file, ns=(turn, turn))
    source._read()

    fresh = FileSource([str(tmp_path)])
    fresh._read()

    assert [part.document for part in source._files[str(file)].parts] == [
        part.document for part in fresh._files[str(file)].parts
    ]
    assert {key: (manifest.object, manifest.place) for key, manifest in source._reported.items()} == {
        key: (manifest.object, manifest.place) for key, manifest in fresh._reported.items()
    }


def _numbered(number: int, port: int) -> str:
    return f"apiVersion: v1\nkind: Service\nmetadata: {{name: s{number}}}\nspec: {{ports: [{{port: {port}}}]}}\n"


# ---- half-written files


async def test_a_half_written_file_is_not_read_before_its_writer_closes_it(tmp_path: Path) -> None:
    file, other = tmp_path / "a.yaml", tmp_path / "c.yaml"
    file.write_text(service("a") + service("b"))
    other.write_text(service("c"))
    (tmp_path / "link.yaml").symlink_to("nothing")  # because of it, each change makes the source look at all files

    async with following(tmp_path) as told:
        with file.open("w") as writing:
            for port in (81, 82):
                other.write_text(service("c", port))
                await told.until(lambda port=port: told.ports["c"] == port)  # type: ignore[misc]
                assert told.ports == {"a": 80, "b": 80, "c": port}
                writing.write(service("a", 81))
                writing.flush()
            writing.write(service("b", 81))
        await told.until(lambda: told.ports == {"a": 81, "b": 81, "c": 82})

        assert (EventType.DELETE, "b") not in told.since(0)


async def test_whatever_pauses_a_writer_makes_only_whole_files_are_reported(tmp_path: Path) -> None:
    file, chance = tmp_path / "a.yaml", random.Random(1)
    names = [f"s{number}" for number in range(8)]
    file.write_text("".join(service(name, 1) for name in names))

    def write_versions() -> None:
        for version in range(2, 80):
            with file.open("w") as writing:
                for name in names:
                    writing.write(service(name, version))
                    if chance.random() < 0.3:
                        writing.flush()
                        threading.Event().wait(chance.random() * 0.004)
            threading.Event().wait(chance.random() * 0.006)

    async with following(tmp_path) as told:
        await asyncio.to_thread(write_versions)
        await told.until(lambda: set(told.ports.values()) == {79})

        assert all(set(state) == set(names) and len(set(state.values())) == 1 for state in told.states)


async def test_a_writer_that_keeps_its_file_open_is_waited_for_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_watch, "_UNCLOSED_S", 0.1)
    monkeypatch.setattr(files, "_LOOK_AGAIN_S", 0.1)
    file = tmp_path / "a.yaml"
    file.write_text(service("a"))

    async with following(tmp_path) as told:
        with file.open("a") as writing:
            writing.write(service("b"))
            writing.flush()
            await told.until(lambda: told.ports == {"a": 80, "b": 80})


async def test_a_change_within_one_tick_of_the_clock_of_time_stamps_is_seen(tmp_path: Path) -> None:
    """Before Linux 6.13 two changes within 4 ms may get the same time stamp; here it is set."""
    file = tmp_path / "a.yaml"
    file.write_text(service("a", 80))
    tick_ns = time.time_ns() + 900_000_000  # the first read must come within 1 s of it
    os.utime(file, ns=(tick_ns, tick_ns))

    async with following(tmp_path) as told:
        assert told.ports == {"a": 80}
        with file.open("w") as writing:
            writing.write(service("a", 81))
            writing.flush()
            os.utime(writing.fileno(), ns=(tick_ns, tick_ns))
        await told.until(lambda: told.ports == {"a": 81})


async def test_a_file_that_is_emptied_keeps_its_objects_until_it_is_filled(tmp_path: Path) -> None:
    file, other = tmp_path / "a.yaml", tmp_path / "c.yaml"
    file.write_text(service("a"))

    async with following(tmp_path) as told:
        file.write_text("")
        other.write_text(service("c"))
        await told.until(lambda: "c" in told.ports)
        assert told.ports["a"] == 80

        file.write_text("")
        await told.until(lambda: "a" not in told.ports)


# ---- changes that a notification names


@pytest.fixture
def looks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sources look at all files again after years only, so that they depend on notifications."""
    monkeypatch.setattr(files, "_LOOK_AGAIN_SHARE", 1e-12)


@pytest.mark.usefixtures("looks_once")
async def test_a_notification_is_enough_for_an_edited_a_new_and_a_deleted_file(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.yaml").write_text(service(name))

    async with following(tmp_path) as told:
        put_in_place(tmp_path / "a.yaml", service("a", 81))
        await told.until(lambda: told.ports == {"a": 81, "b": 80})
        (tmp_path / "c.yaml").write_text(service("c"))
        await told.until(lambda: told.ports == {"a": 81, "b": 80, "c": 80})
        (tmp_path / "b.yaml").unlink()
        await told.until(lambda: told.ports == {"a": 81, "c": 80})


@pytest.mark.usefixtures("looks_once")
async def test_a_fault_in_one_file_stays_reported_while_another_one_changes(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(service("a"))
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "c.yaml").write_text("kind: [")

    async with following(tmp_path) as told:
        faults = dict(told.source.problems)
        assert len(faults) == 2
        (tmp_path / "a.yaml").write_text(service("a", 81))
        await told.until(lambda: told.ports == {"a": 81})
        assert told.source.problems == faults

        (tmp_path / "b.yaml").write_text(service("b"))
        await told.until(lambda: told.ports == {"a": 81, "b": 80})
        assert len(told.source.problems) == 1


@pytest.mark.usefixtures("looks_once")
async def test_a_swapped_link_changes_all_files_that_are_reached_by_it(tmp_path: Path) -> None:
    """As kubelet updates a ConfigMap's volume."""
    for version, port in (("..1", 80), ("..2", 81)):
        (tmp_path / version).mkdir()
        for name in "ab":
            (tmp_path / version / f"{name}.yaml").write_text(service(name, port))
    (tmp_path / "..data").symlink_to("..1")
    for name in "ab":
        (tmp_path / f"{name}.yaml").symlink_to(f"..data/{name}.yaml")

    async with following(tmp_path) as told:
        assert told.ports == {"a": 80, "b": 80}
        (tmp_path / "..new").symlink_to("..2")
        (tmp_path / "..new").replace(tmp_path / "..data")
        await told.until(lambda: told.ports == {"a": 81, "b": 81})


@pytest.mark.usefixtures("looks_once")
@pytest.mark.parametrize("is_deleted", [False, True], ids=["moved", "deleted"])  # ext4 may use its inode again
async def test_a_folder_made_anew_is_watched_again(tmp_path: Path, is_deleted: bool) -> None:
    folder = tmp_path / "manifests"
    folder.mkdir()
    (folder / "a.yaml").write_text(service("a"))

    async with following(folder) as told:
        folder.rename(tmp_path / "old")
        if is_deleted:
            shutil.rmtree(tmp_path / "old")
        folder.mkdir()
        (folder / "a.yaml").write_text(service("a", 81))
        await told.until(lambda: told.ports == {"a": 81})
        with (folder / "a.yaml").open("w") as writing:
            writing.write(service("a", 82))
            writing.flush()
            put_in_place(folder / "b.yaml", service("b"))
            await told.until(lambda: "b" in told.ports)
            assert told.ports["a"] == 81  # without a watch, the half-written file would be read, too
        await told.until(lambda: told.ports["a"] == 82)


@pytest.mark.usefixtures("looks_once")
async def test_a_notification_is_enough_for_a_link_and_for_a_renamed_file(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    for name in "abc":
        (elsewhere / f"{name}.yaml").write_text(service(name))

    async with following(folder) as told:
        (folder / "hard.yaml").hardlink_to(elsewhere / "a.yaml")
        await told.until(lambda: told.ports == {"a": 80})
        (folder / "hard.yaml").rename(folder / "renamed.yaml")
        (elsewhere / "b.yaml").rename(folder / "moved.yaml")
        await told.until(lambda: told.ports == {"a": 80, "b": 80})
        (folder / "soft.yaml").symlink_to(elsewhere / "c.yaml")
        await told.until(lambda: told.ports == {"a": 80, "b": 80, "c": 80})

        assert EventType.DELETE not in [event for event, _ in told.since(0)]
        assert not told.source.problems


@pytest.mark.usefixtures("looks_once")
async def test_a_file_that_an_editor_moves_away_and_writes_anew_is_never_gone(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(service("a"))

    async with following(tmp_path) as told:
        file.rename(tmp_path / "a.yaml~")
        file.write_text(service("a", 81))
        await told.until(lambda: told.ports == {"a": 81})

        assert (EventType.DELETE, "a") not in told.since(0)


@pytest.mark.usefixtures("looks_once")
async def test_changes_that_overflow_the_kernels_queue_are_seen(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(service("a"))
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())

    async with following(tmp_path) as told:
        with (tmp_path / "x").open("wb", 0) as x, (tmp_path / "y").open("wb", 0) as y:
            for _ in range(limit // 2 + 1):  # two in turn: the kernel merges equal events
                x.write(b"x")
                y.write(b"y")
            file.write_text(service("a", 81))
            await told.until(lambda: told.ports == {"a": 81})


def test_where_the_kernel_watches_no_more_folders_files_are_looked_at_periodically(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(service("a"))
    code = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from userspace_proxy.sources.files import FileSource\n"
        "async def main():\n"
        "    events = FileSource([sys.argv[1]]).events()\n"
        "    print(*await anext(events), *await anext(events))\n"
        "    text = Path(sys.argv[1], 'a.yaml').read_text()\n"
        "    Path(sys.argv[1], 'b.yaml').write_text(text.replace('name: a', 'name: b'))\n"
        "    print(*await anext(events))\n"
        "asyncio.run(main())\n"
    )
    forbid = 'echo 0 > /proc/sys/user/max_inotify_watches; exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", forbid, "sh", sys.executable, "-P", "-c", code]

    result = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True)

    assert result.stdout.splitlines()[-1].count("SET") == 1
    assert "max_user_watches is reached), they are looked at once a second" in result.stderr
