"""A command whose standard streams are closed works, and its output goes nowhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import os, sys
from userspace_proxy.__main__ import main
sys.argv[1:] = ["check", "-"]
try:
    main()
finally:
    os.write(int(os.environ["TO"]), "".join(os.readlink(f"/proc/self/fd/{number}") for number in range(3)).encode())
"""

GOOD = """\
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80}]}
"""


@pytest.mark.parametrize("closing", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_dev_null_and_stops_no_command(closing: str) -> None:
    script = f'TO=3; export TO; exec "$@" 3>&2 {closing}'
    done = subprocess.run(
        ["sh", "-c", script, "sh", sys.executable, "-c", CODE],
        input="kind: Service\n",
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )

    assert done.stderr.count("/dev/null") == closing.count("&-")
    assert "Traceback" not in done.stderr
    assert done.returncode == 1, "the manifest is wrong, or stdin is closed"


@pytest.mark.parametrize(("path", "end", "code"), [("/dev/null", "", 0), ("/dev/full", "", 1), ("/dev/null", "x", 1)])
def test_a_command_ends_with_its_code_or_says_that_its_output_is_lost(path: str, end: str, code: int) -> None:
    command = [sys.executable, "-m", "userspace_proxy", "check", "-"]
    with Path(path).open("w") as stdout:
        done = subprocess.run(
            command, input=f"{GOOD}{end}", stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=30, check=False
        )

    assert done.returncode == code
    lost = "userspace-proxy: the output is not complete: No space left on device\n"
    assert done.stderr == (lost if path == "/dev/full" else "")


def test_all_of_a_long_output_arrives() -> None:
    services = "".join(f"---\n{GOOD.replace('web', f'web{number}')}" for number in range(4_000))
    command = [sys.executable, "-m", "userspace_proxy", "render", "-"]
    done = subprocess.run(command, input=services, capture_output=True, text=True, timeout=60, check=False)

    assert done.returncode == 0, done.stderr
    assert "default/web3999" in done.stdout
    assert len(done.stdout) > 1 << 17, "more than a pipe takes at once"
