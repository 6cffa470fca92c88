"""Servers of a lab: nginx in pods, and the proxy itself on a node."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from userspace_proxy.errors import StartError
from userspace_proxy.lab.clients import ask
from userspace_proxy.lab.hosts import Host

HTTP_PORT = 8080
_START_TIMEOUT_S = 20.0
_PROXY_TIMEOUT_S = 180.0  # an emulated machine needs minutes; a process that ends is noticed at once
_POLL_S = 0.01

# One process, without root; it writes only to its own folder.
_NGINX = """\
daemon off; master_process off; user root; pid {folder}/nginx.pid; error_log stderr error;
events {{ worker_connections 512; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{ listen [::]:{port} ipv6only=off; location / {{ return 200 "{name}\\n"; }} }}
}}
"""
_SERVICE = """\
apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec:
  clusterIP: {ip}
  ports: [{{port: 80}}]{options}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}-1, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: IPv4
ports: [{{port: {port}}}]
endpoints: [{endpoints}]
---
"""


def wait_until(
    condition: Callable[[], object],
    what: str,
    *,
    timeout_s: float = _START_TIMEOUT_S,
    poll_s: float = _POLL_S,
    process: subprocess.Popen[bytes] | None = None,
    log: Path | None = None,
) -> float:
    """Return the seconds until *condition* is true; an OSError counts as false.

    Raises:
        StartError: *process* ended, or the time is over. The message names *what*, and the end of *log* or the error.
    """
    started_at = time.monotonic()
    reason = ""
    while True:
        try:
            if condition():
                return time.monotonic() - started_at
        except OSError as error:
            reason = str(error)
        if _has_ended(process) or time.monotonic() > started_at + timeout_s:
            break
        time.sleep(poll_s)
    raise StartError(f"{what}: {(log and last_line(log)) or reason or 'timed out'}")


def _has_ended(process: subprocess.Popen[bytes] | None) -> bool:
    return process is not None and process.poll() is not None


def last_line(log: Path) -> str:
    """Return the last line of *log* without the command's name, or "" if it is empty or missing."""
    lines = log.read_text().strip().splitlines() if log.exists() else []
    return lines[-1].removeprefix("userspace-proxy: ").removeprefix("Error: ") if lines else ""


def start_nginx(pod: Host, folder: Path) -> subprocess.Popen[bytes]:
    """Start nginx in *pod* at HTTP_PORT; it answers every request with the pod's name.

    Raises:
        StartError: nginx is not installed or does not answer.
    """
    if not (shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")):
        raise StartError("nginx is not installed; install the package nginx-light")
    own = folder / pod.name
    own.mkdir(exist_ok=True)
    (own / "nginx.conf").write_text(_NGINX.format(folder=own, name=pod.name, port=HTTP_PORT))
    process = pod.start("nginx", "-p", str(own), "-c", str(own / "nginx.conf"), log=own / "log")

    def answers() -> str:
        return ask(pod, "127.0.0.1", HTTP_PORT, timeout_s=1.0)

    wait_until(answers, "nginx does not answer", process=process, log=own / "log")
    return process


def start_proxy(node: Host, manifests: Path | None, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start ``userspace-proxy run`` on *node* for *manifests*, or as *arguments* say; return it when it is ready.

    Its state is kept beside *log*, so that no state of another run is used.

    Raises:
        StartError: the proxy ended or is not ready in time; the message has its last log line.
    """
    log.write_text("")
    command = [sys.executable, "-P", "-m", "userspace_proxy", "run", *([str(manifests)] if manifests else [])]
    process = node.start(*command, "--state-dir", str(log.with_name("state")), *arguments, log=log)
    wait_until(
        lambda: "ready:" in log.read_text(),
        "the proxy did not start",
        timeout_s=_PROXY_TIMEOUT_S,
        process=process,
        log=log,
    )
    return process


def service(name: str, ip: str, pods: list[str], *, port: int = HTTP_PORT, options: str = "") -> str:
    """Return the manifest of a Service at *ip* with port 80, and of its endpoints; *options* are lines of its spec."""
    endpoints = ", ".join(f"{{addresses: [{pod}]}}" for pod in pods)
    return _SERVICE.format(
        name=name, ip=ip, port=port, endpoints=endpoints, options=f"\n  {options}" if options else ""
    )
