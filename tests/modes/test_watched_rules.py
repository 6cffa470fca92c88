"""Rules that cannot be removed are reported as such, whatever refused the removal."""

import subprocess
import sys

WITHOUT_PRIVILEGES = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs")
CODE = """
import asyncio

from userspace_proxy.errors import SyncError
from userspace_proxy.modes.userspace.loader import NftKernel

try:
    asyncio.run(NftKernel().remove_rules())
except SyncError as error:
    print(error)
"""


def test_a_kernel_that_does_not_even_count_rules_refuses_their_removal_with_a_reason() -> None:
    command = (*WITHOUT_PRIVILEGES, sys.executable, "-c", CODE)

    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)

    assert "not permitted" in done.stdout
    assert "CAP_NET_ADMIN" in done.stdout
