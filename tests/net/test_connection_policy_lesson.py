"""The lesson about connection policies, played as it is written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.examples.test_examples import EXAMPLES


def test_connections_grow_old_lose_their_pod_and_wait_as_the_lesson_says() -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    played = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", str(EXAMPLES / "play.sh"),
         "connection-policy"],
        capture_output=True, text=True, timeout=120, check=True, env={**os.environ, "PATH": path},
    ).stdout.splitlines()  # fmt: skip

    said = [line for line in played if line in ("the connection has ended", "the connection was reset", POD)]
    assert said == ["the connection has ended", "the connection was reset", POD]
    ends = [line.partition(f"-> {POD} ")[2] for line in played if f"-> {POD} (" in line]
    assert [end.partition(" up=")[0] for end in ends] == ["(round robin)"] * 2 + ["(round robin, after a wait)"]
    assert [end.partition("ms ")[2] for end in ends] == [
        "closed by max-connection-age",
        "reset by on-endpoint-removal",
        "closed",
    ]


POD = "10.244.0.2:8080"
