"""A data plane in a process with few descriptors. Run as a script: ENDPOINT_IP ENDPOINT_PORT.

Says ``ready``, serves until its input ends, then says how often it paused accepting and how often something was short.
"""

from __future__ import annotations

import asyncio
import resource
import sys

from tests.dataplane.world import running_plane
from userspace_proxy.model.endpoint import Endpoint

DESCRIPTORS = 64


async def serve(endpoint: Endpoint) -> None:
    async with running_plane() as plane:
        await plane.use(endpoint)
        print("ready", flush=True)  # noqa: T201 - it is a script
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        stats = await plane.local.stats()
        print(stats.accept_paused, stats.local_shortages, flush=True)  # noqa: T201


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    asyncio.run(serve(Endpoint(sys.argv[1], int(sys.argv[2]))))
