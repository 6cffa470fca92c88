"""The `lab` command: builds the network, starts the proxy, and runs a shell or a command on the client.

The shell runs on the client, as a client outside of the node sees Services. Words that inspect rules run on the node.
Everything is in namespaces of this process, and its files are on a private /run: nothing is left when it ends.
"""

import asyncio
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from userspace_proxy.config.settings import MODE_NAMES, Settings
from userspace_proxy.control.pod_names import environment
from userspace_proxy.errors import StartError
from userspace_proxy.lab import NODE_IP, Lab, ServiceLab, build_service_lab, prepare, start_proxy
from userspace_proxy.lab.cluster import Cluster, check_paths
from userspace_proxy.lab.words import NO_MODE, WordError, Words
from userspace_proxy.lab.workloads import NODE_NAME
from userspace_proxy.runtime.desired_state import known_services

_FOLDER = Path("/run/lab")
_RESOLV_CONF = Path("/etc/resolv.conf")
_DNS_IP = "10.96.0.10"
_LOAD_BALANCERS = "203.0.113.0/24"
_RESOLVER = f"nameserver {_DNS_IP}\nsearch default.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n"
_WORDS = Path(__file__).with_name("words.sh")
# Words of the script that the lab itself does not answer.
_SCRIPTS = (
    *("node", "nft", "iptables", "iptables-save", "ip6tables", "ip6tables-save", "conntrack", "ipvsadm"),
    *("userspace-proxy", "describe", "why", "check", "render", "trace", "port-forward", "kubectl"),
    *("lookup", "access-log", "proxy-log", "lab-help"),
)
_WELCOME = """\
A client, and a node with the proxy in {mode} mode. Try: get pods, get services, curl http://NAME, lab-help
"""


def run(paths: Sequence[str], command: Sequence[str], mode: str) -> int:
    """Run the lab until its shell or *command* ends, and return the exit code. Raises StartError."""
    check_paths(paths)
    prepare()
    try:
        with Lab() as lab:
            return asyncio.run(_run(lab, [str(Path(path).resolve()) for path in paths], command, mode))
    except subprocess.CalledProcessError as error:
        raise StartError(f"{' '.join(error.cmd)}: {(error.stderr or error.stdout or '').strip()}") from None


async def _run(lab: Lab, paths: Sequence[str], command: Sequence[str], mode: str) -> int:
    # Ctrl-C is for the program in front. A handler, and not SIG_IGN, which the shell would inherit.
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, lambda: None)
    network = build_service_lab(lab, pods=0)
    manifests = _FOLDER / "manifests"
    manifests.mkdir(parents=True)
    _write_resolver()
    cluster = Cluster(network, manifests)
    proxy = _Proxy(network, manifests)
    words = Words(cluster, proxy.set_mode)
    await cluster.declare(paths)
    async with asyncio.TaskGroup() as starting:
        starting.create_task(proxy.set_mode(mode))
        starting.create_task(cluster.begin())
    if cluster.problem:
        sys.stderr.write(f"userspace-proxy: {cluster.problem}\n")
    server = await asyncio.start_unix_server(lambda *streams: _obey(words, *streams), _FOLDER / "words.sock")
    following = asyncio.create_task(cluster.follow(), name="follow manifests")
    environment = _write_words(words)
    shell = await asyncio.create_subprocess_exec(
        *network.client.command(*(command or _shell(mode))),
        env=environment | (await _service_variables(manifests) if paths else {}),
    )
    code = await shell.wait()
    following.cancel()
    server.close()
    return code if code >= 0 else 128 - code


class _Proxy:
    """The proxy on the node."""

    def __init__(self, network: ServiceLab, manifests: Path) -> None:
        self._network = network
        self._manifests = manifests
        self._process: subprocess.Popen[bytes] | None = None

    async def set_mode(self, mode: str) -> None:
        """Start the proxy in *mode*, or none, after the end of one that runs.

        Raises:
            WordError: there is no such mode, or the proxy does not start.
        """
        if mode not in (*MODE_NAMES, NO_MODE):
            raise WordError(f"{mode!r} is no mode; modes: {', '.join(MODE_NAMES)}, or {NO_MODE}")
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)  # removes its rules, also in a kernel mode
            await asyncio.to_thread(self._process.wait, 15)
            self._process = None
        (_FOLDER / "mode").write_text(f"{mode}\n")
        if mode == NO_MODE:
            return
        options = ["--proxy-mode", mode, "--dns", _DNS_IP, "--hostname-override", NODE_NAME]
        options += ["--load-balancer-pool", _LOAD_BALANCERS, "--access-log", str(_FOLDER / "access.log")]
        options += ["--drain-timeout", "0s"]
        log = _FOLDER / "proxy.log"
        self._process = await asyncio.to_thread(start_proxy, self._network.node, self._manifests, log, *options)


async def _obey(words: Words, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    folder, word, *arguments = json.loads(await reader.readline())
    answer = 1, f"{word}: the lab has failed; its traceback says where"  # without an answer, the client waits for ever
    try:
        answer = 0, await words.obey(word, arguments, Path(folder))
    except (WordError, StartError) as error:
        answer = 1, f"{word}: {error}"
    finally:
        writer.write(json.dumps(answer).encode() + b"\n")
        writer.close()


# ---- what the shell finds


def _shell(mode: str) -> list[str]:
    sys.stdout.write(_WELCOME.format(mode=mode))
    sys.stdout.flush()
    if shutil.which("bash") is None:
        return ["sh"]
    (_FOLDER / "bashrc").write_text("unset HISTFILE\nPS1='[lab $(cat /run/lab/mode)] \\w\\$ '\n")
    return ["bash", "--noprofile", "--rcfile", str(_FOLDER / "bashrc"), "-i"]


def _write_words(words: Words) -> dict[str, str]:
    """Link the shell's words to their script, and return its environment."""
    folder = _FOLDER / "bin"
    folder.mkdir()
    paths = {"PYTHON": sys.executable, "PACKAGE": str(_WORDS.parent), "OWN_PATH": os.environ["PATH"]}
    (_FOLDER / "paths").write_text("".join(f"{name}={shlex.quote(path)}\n" for name, path in paths.items()))
    script = _FOLDER / "words.sh"
    script.write_text(_WORDS.read_text())
    script.chmod(0o755)
    for name in (*words.names, *_SCRIPTS, *(() if shutil.which("nslookup") else ("nslookup",))):
        (folder / name).symlink_to(script)
    return {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "USERSPACE_PROXY_CONTROL_SOCKET": str(_FOLDER / "state" / "control.sock"),
        "USERSPACE_PROXY_LAB_SOCKET": str(_FOLDER / "words.sock"),
        "NODE_IP": NODE_IP,
    }


async def _service_variables(manifests: Path) -> dict[str, str]:
    """Return the variables that the kubelet sets for Services in a pod that starts now."""
    settings = Settings(paths=(str(manifests),), state_dir=_FOLDER / "state")
    return environment(await known_services(settings), "default")


def _write_resolver() -> None:
    """Make cluster DNS the resolver of everything in the lab; the machine's own file is covered, not changed."""
    resolver = _FOLDER / "resolv.conf"
    resolver.write_text(_RESOLVER)
    target = _RESOLV_CONF.resolve()
    if target.is_relative_to("/run"):  # a link into what is private here
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_RESOLVER)
    elif target.exists():
        subprocess.run(["mount", "--bind", str(resolver), str(target)], check=True, capture_output=True, text=True)
    else:
        sys.stderr.write(f"userspace-proxy: {_RESOLV_CONF} is missing, so no name is found; ask at {_DNS_IP}\n")
