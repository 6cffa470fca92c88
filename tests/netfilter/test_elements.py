"""Elements are changed in the kernel as they are written down."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHANGE = """
import socket, subprocess
from userspace_proxy.errors import SyncError
from userspace_proxy.netfilter.elements import NftSocket, Transaction, element

subprocess.run(["nft", "table inet a { set s { type ipv4_addr; }; }"], check=True)
transaction = Transaction("inet a")
transaction.add("s", [element(socket.inet_aton(f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}")) for n in range(COUNT)])
try:
    transaction.commit(NftSocket())
except SyncError as error:
    print(error)
else:
    print(subprocess.run(["nft", "list", "set", "inet", "a", "s"], capture_output=True, text=True).stdout.count("10."))
"""


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (1_000, "1000"),
        (1_000_000, "elements could not be changed: Message too long; more fit with a larger sysctl net.core.wmem_max"),
    ],
)
def test_the_root_of_a_user_namespace_changes_elements_up_to_what_the_machine_sends_at_once(
    count: int, said: str
) -> None:
    command = [
        "unshare",
        "--user",
        "--map-root-user",
        "--net",
        sys.executable,
        "-c",
        CHANGE.replace("COUNT", str(count)),
    ]

    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)

    assert done.stdout.strip() == said, done.stderr
