"""The state file: what is saved, and how invalid files are handled."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

import pytest

from userspace_proxy.control.memory import SavedAllocations, StateDir

KNOWN = SavedAllocations(cluster_ips={"default/web/IPv4": "10.96.3.4"}, proxy_ports={"default/web:/TCP": 12_345})


def test_what_was_saved_is_loaded_by_the_next_process(tmp_path: Path) -> None:
    StateDir(tmp_path / "state").save(KNOWN)

    assert StateDir(tmp_path / "state").load() == KNOWN


def test_a_new_state_folder_is_empty_and_logs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert StateDir(tmp_path / "a" / "b").load() == SavedAllocations()
    assert not caplog.records


def test_saving_replaces_what_was_there_and_leaves_nothing_else(tmp_path: Path) -> None:
    state_dir = StateDir(tmp_path)
    state_dir.save(KNOWN)

    state_dir.save(SavedAllocations())

    assert state_dir.load() == SavedAllocations()
    assert [path.name for path in tmp_path.iterdir()] == ["allocations.json"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"clusterIps": null}',
        b'{"clusterIps": {"default/web/IPv4": "somewhere"}}',
        b'{"clusterIps": {"default/web/IPv4": 7}}',
        b'{"loadBalancerIps": {"default/web/load-balancer/IPv4": "somewhere"}}',
        b'{"loadBalancerIps": {"default/web/load-balancer/IPv6": "fd00::9%eth0"}}',
        b'{"nodePorts": {"default/web/TCP": "30080"}}',
        b'{"proxyPorts": {"default/web:/TCP": "12345"}}',
        b'{"proxyPorts": {"default/web:/TCP": 1.5}}',
        b'{"externalPortals": {"203.0.113.8:80/TCP": 7}}',
    ],
)
def test_an_invalid_state_file_is_reported_and_ignored(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "allocations.json").write_bytes(content)

    assert StateDir(tmp_path).load() == SavedAllocations()
    assert "allocations.json cannot be used" in caplog.text


def test_a_file_of_a_later_release_with_more_in_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "allocations.json").write_text('{"version": 1, "more": [1], "proxyPorts": {"default/web:/TCP": 1}}')

    assert StateDir(tmp_path).load().proxy_ports == {"default/web:/TCP": 1}


def test_a_failure_to_save_is_reported_and_leaves_the_old_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state_dir = StateDir(tmp_path / "state")
    (tmp_path / "state").rmdir()

    with caplog.at_level(logging.WARNING):
        state_dir.save(KNOWN)

    assert "cannot be written" in caplog.text


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
def test_a_state_file_of_another_kind_is_named_and_not_waited_for(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "allocations.json"
    with socket.socket(socket.AF_UNIX) as sock:
        match kind:
            case "pipe":
                os.mkfifo(file)
            case "socket":
                sock.bind(str(file))
            case "device":
                file.symlink_to("/dev/zero")
            case _:
                file.mkdir()
        assert StateDir(tmp_path).load() == SavedAllocations()

    assert "not a regular file" in caplog.text


def test_a_failure_that_lasts_is_reported_once_and_its_end_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state_dir = StateDir(folder := tmp_path / "state")
    folder.rmdir()
    with caplog.at_level(logging.INFO):
        assert [state_dir.save(KNOWN) for _ in range(3)] == [False] * 3
        folder.mkdir()
        assert state_dir.save(KNOWN)

    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_a_folder_that_is_a_file_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")

    with pytest.raises(OSError, match="File exists"):
        StateDir(tmp_path / "state")
