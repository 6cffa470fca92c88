"""The tutorial, run as it is written: a killed backend costs no request, and iptables rules still name it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tutorial" / "first-failover.md"
VICTIM = "10.244.0.3:8080"


def test_the_commands_of_the_tutorial_show_what_it_says(tmp_path: Path) -> None:
    """The first block is `make demo`, and the first line of the second one opens the shell."""
    _, opening, *blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    script = "".join(f"{block}echo ==\n" for block in [opening.partition("\n")[2].partition("\n")[2], *blocks])
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    done = subprocess.run(
        # A PID namespace of its own: whatever fails, no process stays.
        ["unshare", "--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "bash"],
        input=script,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"},
    )
    _, _, nine, killed, failover, again, _, kernel, rules, _ = done.stdout.split("==\n")

    assert "answering" not in nine + killed
    assert nine.count(VICTIM) == 3
    assert len(killed.split()) == 9
    assert VICTIM not in killed
    assert "(failover)" in failover
    assert again.count(VICTIM) == 3
    assert VICTIM not in kernel
    assert VICTIM in rules
