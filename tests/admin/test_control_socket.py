"""The file of the control socket. What it answers is tested with a running proxy (tests/net/test_ask.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from userspace_proxy.admin.control_socket import ControlSocket
from userspace_proxy.errors import StartError


async def test_a_file_or_folder_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "web.yaml").write_text("kind: Service")
    (tmp_path / "folder").mkdir()

    for name in ("web.yaml", "folder"):
        with pytest.raises(StartError, match=f"--control-socket .*{name}: there is something that is no socket"):
            await ControlSocket({}).start(tmp_path / name)

    assert (tmp_path / "web.yaml").read_text() == "kind: Service"
    assert len(list(tmp_path.iterdir())) == 2


async def test_the_socket_of_a_process_that_was_killed_is_replaced(tmp_path: Path) -> None:
    first, second = ControlSocket({}), ControlSocket({})
    await first.start(tmp_path / "socket")
    await second.start(tmp_path / "socket")
    await first.close()
    assert (tmp_path / "socket").is_socket()
    await second.close()
    assert list(tmp_path.iterdir()) == []
