"""The manifest of a Service with two endpoints, a node port and affinity, and of others; `render` as a process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from userspace_proxy.modes import MODES
from userspace_proxy.modes.mode import RenderedMode

# The modes in the order in which `render` shows them.
WAYS = tuple(RenderedMode(mode, language) for mode in MODES.values() for language in mode.languages)

SHOP = """\
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  type: NodePort
  selector: {app: web}
  clusterIP: 10.96.0.1
  sessionAffinity: ClientIP
  ports: [{name: http, port: 80, targetPort: 8080, nodePort: 30080}]
---
apiVersion: v1
kind: Service
metadata: {name: dns, namespace: shop}
spec:
  selector: {app: web}
  clusterIP: 10.96.0.10
  ports: [{name: dns, port: 53, protocol: UDP}, {name: dns-tcp, port: 53, protocol: TCP}]
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: office}
spec: {selector: {app: nobody}, clusterIP: 10.96.0.3, ports: [{port: 80}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web-1, namespace: shop, labels: {app: web}}
status: {podIP: 10.244.0.2}
---
apiVersion: v1
kind: Pod
metadata: {name: web-2, namespace: shop, labels: {app: web}}
status: {podIP: 10.244.0.3}
"""


def render(*arguments: str | Path, before: Sequence[str] = (), stdin: str = SHOP) -> subprocess.CompletedProcess[str]:
    """Run `userspace-proxy render` as a process, by the command *before* it."""
    return subprocess.run(
        [*before, sys.executable, "-m", "userspace_proxy", "render", *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=30,
    )
