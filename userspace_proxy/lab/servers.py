"""Real servers in lab hosts."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

from userspace_proxy.errors import StartError
from userspace_proxy.lab.clients import ask
from userspace_proxy.lab.hosts import Host

HTTP_PORT = 8080
_START_TIMEOUT_S = 5.0

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
    give_up_at = time.monotonic() + _START_TIMEOUT_S
    while True:
        try:
            ask(pod, "127.0.0.1", HTTP_PORT, timeout_s=1.0)
        except OSError as error:
            if time.monotonic() > give_up_at or process.poll() is not None:
                raise StartError(f"nginx does not answer: {(own / 'log').read_text().strip() or error}") from None
            time.sleep(0.01)
        else:
            return process
