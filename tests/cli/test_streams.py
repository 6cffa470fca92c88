"""A command whose standard streams are closed works, and its output goes nowhere."""

from __future__ import annotations

import subprocess
import sys

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
