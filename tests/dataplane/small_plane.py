"""A data plane in a process with few descriptors. Run as a script: ENDPOINT_IP ENDPOINT_PORT [OTHER_IP OTHER_PORT].

The other endpoint is that of the other service port.

Says ``ready``, serves until its input ends, then says how often it paused accepting and how often something was short.
"""

from __future__ import annotations

import asyncio
import resource
import sys

from tests.dataplane.world import OTHER_LISTENER, OTHER_PORT, other_service_port, running_plane
from userspace_proxy.dataplane import tcp
from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.listeners import Backends, ListenerSpec

DESCRIPTORS = 64


async def serve(endpoint: Endpoint, *others: Endpoint) -> None:
    async with running_plane() as plane:
        await plane.use(endpoint)
        await plane.local.open([ListenerSpec(other_service_port(), OTHER_PORT)])
        await plane.local.update({OTHER_LISTENER: Backends(others, others)})
        print("ready", flush=True)  # noqa: T201 - it is a script
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        stats = await plane.local.stats()
        print(stats.accept_paused, stats.local_shortages, flush=True)  # noqa: T201


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    tcp.CROWDED_S = 0.5
    asyncio.run(serve(*(Endpoint(ip, int(port)) for ip, port in zip(sys.argv[1::2], sys.argv[2::2], strict=True))))
