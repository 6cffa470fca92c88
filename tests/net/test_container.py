"""The containers of the DaemonSets, as a real engine runs them on a node: with a proxy in them, and real traffic.

The engine belongs to the test: its own data, its own socket, the lab's node as its host. The image is this machine's
own /usr and this Python, mounted read-only, because no registry can be counted on. What a kubelet would make of a
manifest is made of the same manifest. What the Dockerfile builds is not looked at here.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.net.test_kubernetes import Cluster
from tests.net.world import POD1, POD2, background_requests, wait_until
from tests.sources.test_kubernetes import serving_tls
from userspace_proxy.lab import Host, ServiceLab, ask, connect

PROJECT = Path(__file__).parents[2]
MANIFESTS = PROJECT / "examples" / "kubernetes"
ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
IP = "10.96.9.1"


class Engine:
    """A Docker engine of this test, whose host is *host*."""

    def __init__(self, host: Host, folder: Path) -> None:
        self._socket = f"unix://{folder}/engine.sock"
        self.log_file = folder / "engine.log"
        with self.log_file.open("wb") as log:
            # `ip netns exec` would give it a /sys of its own, without cgroups.
            self.process = subprocess.Popen(
                [
                    *("nsenter", f"--net=/run/netns/{host.name}", "dockerd", "--host", self._socket),
                    *("--data-root", f"{folder}/data", "--exec-root", f"{folder}/exec", "--pidfile", f"{folder}/pid"),
                    *("--storage-driver", "vfs", "--bridge", "none", "--iptables=false", "--ip6tables=false"),
                ],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    def docker(self, *arguments: str, check: bool = True, stdin: bytes = b"") -> str:
        command = ["docker", "--host", self._socket, *arguments]
        done = subprocess.run(command, capture_output=True, timeout=30, check=False, input=stdin)
        said = (done.stdout + done.stderr).decode()
        assert not check or done.returncode == 0, said
        return said

    def answers(self) -> bool:
        assert self.process.poll() is None, self.log_file.read_text()[-2000:]
        return "Server Version" in self.docker("info", check=False)

    def stop(self) -> None:
        for container in self.docker("ps", "--quiet").split():
            self.docker("kill", container)
        self.process.terminate()
        self.process.wait(20)


@pytest.fixture(scope="module")
def engine(world: ServiceLab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    if shutil.which("dockerd") is None or shutil.which("docker") is None:
        pytest.skip("no Docker engine is installed (Debian's package is docker.io)")
    if not _is_real_root():
        pytest.skip("an engine can be started by root only")
    one = Engine(world.node, tmp_path_factory.mktemp("engine"))
    wait_until(one.answers, "the engine answers", 20.0)
    one.docker("import", "-", "userspace-proxy:test", stdin=_skeleton())
    yield one
    one.stop()


def _is_real_root() -> bool:
    """Whether root here is root outside, and no user with a namespace of his own."""
    return Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]


def _skeleton() -> bytes:
    """Return an empty root folder with mount points for this machine's own folders."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name in ("usr", "etc", "proc", "sys", "dev", "run", "tmp", "var", "var/lib"):
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(folder)
        for name in ("bin", "sbin", "lib", "lib64"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, f"usr/{name}"
            tar.addfile(link)
    return made.getvalue()


class Pods:
    """Runs pods of a DaemonSet's template, one after another, as a kubelet would."""

    def __init__(self, engine: Engine, node: Host, variant: str, folder: Path, cluster: Cluster, ca: Path) -> None:
        (self._daemon_set,) = yaml.safe_load_all((MANIFESTS / f"{variant}-kube-proxy.yaml").read_text())
        self._engine = engine
        self._node = node
        self._folder = folder
        host, port = cluster.api.server.url.removeprefix("https://").split(":")
        self._api = {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}
        account = folder / "account"
        account.mkdir()
        (account / "token").write_text("of the pod")
        shutil.copy(ca, account / "ca.crt")

    @property
    def container(self) -> dict[str, Any]:
        (container,) = self._daemon_set["spec"]["template"]["spec"]["containers"]
        return dict(container)

    def run(self, name: str, *more: str) -> None:
        """Start a pod by the name of *name*."""
        arguments = [word.replace("$(NODE_NAME)", "node-1") for word in self.container["args"]]
        self._engine.docker("run", "--detach", "--name", name, *self._options(), *more, "userspace-proxy:test",
                            sys.executable, "-m", "userspace_proxy", *arguments)  # fmt: skip

    def _options(self) -> list[str]:
        pod = self._daemon_set["spec"]["template"]["spec"]
        rights = self.container["securityContext"]
        options = ["--network", "host"] if pod["hostNetwork"] else []
        options += ["--read-only"] if rights["readOnlyRootFilesystem"] else []
        options += [] if rights["allowPrivilegeEscalation"] else ["--security-opt", "no-new-privileges"]
        for drop in rights["capabilities"]["drop"]:
            options += ["--cap-drop", drop]
        for add in rights["capabilities"]["add"]:
            options += ["--cap-add", add]
        (state,) = pod["volumes"]
        (mount,) = self.container["volumeMounts"]
        assert mount["name"] == state["name"]
        there = self._folder / "state"
        there.mkdir(exist_ok=True)
        options += ["--volume", f"{there}:{mount['mountPath']}", "--volume", f"{self._folder}/account:{ACCOUNT}:ro"]
        python = {sys.prefix, sys.base_prefix, str(PROJECT)}
        for path in ("/usr", *sorted(path for path in python if not path.startswith("/usr"))):
            options += ["--volume", f"{path}:{path}:ro"]
        for key, value in {**self._api, "PYTHONPATH": str(PROJECT), "PYTHONDONTWRITEBYTECODE": "1"}.items():
            options += ["--env", f"{key}={value}"]
        return options

    def log(self, name: str) -> str:
        return self._engine.docker("logs", name)

    def is_running(self, name: str) -> bool:
        return self._engine.docker("inspect", "--format", "{{.State.Running}}", name).strip() == "true"

    def probe(self, kind: str) -> int:
        """Send a probe as the kubelet does; return the status, 0 for no answer."""
        asked = self.container[kind]["httpGet"]
        try:
            with connect(self._node, asked["host"], asked["port"], 1.0) as sock:
                sock.sendall(f"GET {asked['path']} HTTP/1.0\r\n\r\n".encode())
                return int(sock.recv(4096).split()[1])
        except OSError:
            return 0

    def wait_ready(self, name: str) -> None:
        def is_ready() -> bool:
            assert self.is_running(name), self.log(name)
            return "ready:" in self.log(name) and self.probe("readinessProbe") == 200

        wait_until(is_ready, f"{name} is ready", 20.0)

    def stop(self, name: str) -> int:
        """Have it end as a kubelet does; return its exit code."""
        grace_s = self._daemon_set["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        self._engine.docker("stop", "--time", str(grace_s), name)
        code = int(self._engine.docker("inspect", "--format", "{{.State.ExitCode}}", name))
        self._engine.docker("rm", name)
        return code


@pytest.fixture
def cluster(world: ServiceLab, tmp_path: Path, certificates: Path) -> Iterator[Cluster]:
    made = Cluster(world, tmp_path, serving_tls(certificates))
    yield made
    world.node.run(*made.proxy.command("cleanup"))
    made.api.close()


def pods_of(variant: str, engine: Engine, cluster: Cluster, certificates: Path) -> Pods:
    folder = cluster.proxy.folder
    return Pods(engine, cluster.world.node, variant, folder, cluster, certificates / "ca.crt")


@pytest.mark.parametrize("variant", ["beside", "in-place-of"])
def test_the_daemon_sets_container_serves_with_one_capability_and_upgrades_without_a_failure(
    engine: Engine, cluster: Cluster, certificates: Path, variant: str
) -> None:
    pods = pods_of(variant, engine, cluster, certificates)
    label = {"service.kubernetes.io/service-proxy-name": "userspace-proxy"} if variant == "beside" else None
    cluster.serve("web", IP, POD1, labels=label)
    pods.run("old")
    pods.wait_ready("old")
    assert cluster.answers() == {"pod1"}
    assert pods.probe("livenessProbe") == 200
    rights = engine.docker("exec", "old", "grep", "Cap[PEB]", "/proc/1/status").split()[1::2]
    assert {int(word, 16) for word in rights} == {1 << 12}, "NET_ADMIN and nothing else"
    assert "Read-only file system" in engine.docker("exec", "old", "touch", "/x", check=False)

    with background_requests(lambda: ask(cluster.world.client, IP)) as outcomes:
        pods.run("new")  # as maxSurge has it
        pods.wait_ready("new")
        assert pods.is_running("old"), "else the kubelet would start it again"
        assert pods.stop("old") == 0
        cluster.serve("web", IP, POD2, labels=label)
        wait_until(lambda: set(outcomes[-5:]) == {"pod2"}, "the new one follows the cluster")

    assert set(outcomes) == {"pod1", "pod2"}
    assert pods.stop("new") == 0
    assert "userspace" not in cluster.world.node.run("nft", "list", "ruleset").stdout


def test_clients_connect_again_after_the_container_is_killed_and_restarted(
    engine: Engine, cluster: Cluster, certificates: Path
) -> None:
    """Its workers die with it, a container being a process namespace: the next start finds rules and no listener."""
    pods = pods_of("in-place-of", engine, cluster, certificates)
    cluster.serve("web", IP, POD1)
    pods.run("first")
    pods.wait_ready("first")
    engine.docker("kill", "--signal", "KILL", "first")
    pods.run("second")
    pods.wait_ready("second")

    assert cluster.answers() == {"pod1"}
    assert pods.stop("second") == 0


def test_a_user_other_than_root_learns_which_capability_is_missing(
    engine: Engine, cluster: Cluster, certificates: Path
) -> None:
    """An engine gives no capability to it that it could use, and `no_new_privs` keeps it so."""
    pods = pods_of("in-place-of", engine, cluster, certificates)
    pods.run("nobody", "--user", "65534")
    wait_until(lambda: not pods.is_running("nobody"), "it gave up")

    assert "CAP_NET_ADMIN" in pods.log("nobody")
    engine.docker("rm", "nobody")
