"""The tutorial, run as it is written: a killed backend costs no request, and iptables rules still name it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tutorial" / "first-failover.md"
VICTIM = "10.244.0.3:8080"


def test_the_commands_of_the_tutorial_show_what_it_says() -> None:
    """The first block is `make demo`, and the second one opens the lab."""
    _, opening, *blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    script = "".join(f"{block}echo ==\n" for block in blocks)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "userspace_proxy", *opening.split()[1:], "--", "bash", "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        cwd=ROOT,
    )
    nine, killed, failover, again, kernel, rules, _ = done.stdout.split("==\n")

    assert nine.count(f"{VICTIM} client") == 3
    assert killed.count("client=") == 9
    assert f"{VICTIM} client" not in killed
    assert "(failover)" in failover
    assert again.count(VICTIM) == 3
    assert f"{VICTIM} client" not in kernel
    assert VICTIM in rules
