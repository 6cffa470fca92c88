"""The simulated cluster: pods on the lab's node, made and ended as controllers and the kubelet do it.

The proxy reads a folder of its own: manifests without Pods and workloads, and one file for each simulated pod. So the
user's manifests are never changed, and `run` can serve them outside of the lab.
"""

import asyncio
import contextlib
import itertools
import json
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from userspace_proxy.control.fields import SUBDOMAIN
from userspace_proxy.errors import ConfigError, StartError
from userspace_proxy.lab.clients import connect
from userspace_proxy.lab.hosts import BRIDGE, GATEWAY, Host, ServiceLab
from userspace_proxy.lab.pod_server import PodServer
from userspace_proxy.lab.workloads import NODE_NAME, Declared, Workload, declared, mapping_of, read
from userspace_proxy.model.names import NamespacedName
from userspace_proxy.printable import printable
from userspace_proxy.sources.documents import Manifest
from userspace_proxy.sources.paths import expand
from userspace_proxy.sources.paths import read as read_file

PODS_MAX = 250
_PODS_NET = "10.244.0.0/16"
_OTHER_HOSTS = ("client", "node")
# What a manifest with fields of a wrong type, or numbers out of range, raises.
_SHAPE_ERRORS = (AttributeError, KeyError, TypeError, ValueError, OverflowError)
_LOOK_EVERY_S = 0.25
GRACE_S = 1.0  # from SIGTERM to the end of a pod
_ROLL_PAUSE_S = 0.3  # from a new pod that is ready to the end of an old one
_SYNC_TIMEOUT_S, _POLL_S = 10.0, 0.02
# After so many answers the proxy would have seen a change, or another one. Not a time: on a busy machine both take
# longer.
_ANSWERS_WITHOUT_CHANGE, _ANSWERS_WITHOUT_ANOTHER = 25, 4
_METRICS_PORT = 10249
_NAME_MAX = 240  # of a pod with its namespace, so that the name of its file has 255 characters at most
_POD_FILE = "pod-"  # begins the name of each pod's file; files of manifests begin with a number
_TIMESTAMP = re.compile(rb"^kubeproxy_sync_proxy_rules_last_(queued_)?timestamp_seconds\S* (\S+)$", re.MULTILINE)


@dataclass(eq=False, slots=True)
class SimulatedPod:
    """A simulated pod. ``owner``: its workload; ``plain``: its manifest, or None for an address written by hand."""

    key: NamespacedName
    ip: str
    host: Host
    server: PodServer
    plain: Mapping[str, Any] | None = None
    owner: NamespacedName | None = None
    revision: str = ""
    number: int = 0
    is_ready: bool = True
    ending: asyncio.Task[None] | None = None
    trouble: str = ""  # Dead, Hangs or Silent: what the API does not know
    started_at: float = 0.0

    @property
    def is_terminating(self) -> bool:
        return self.ending is not None

    @property
    def state(self) -> str:
        return "Terminating" if self.is_terminating else self.trouble or "Running"

    def manifest(self) -> str:
        """Return the Pod as the API server has it: with a node, an address and conditions."""
        assert self.plain is not None
        spec = {"nodeName": NODE_NAME, **mapping_of(self.plain, "spec")}
        metadata = dict(self.plain["metadata"])
        if self.is_terminating:
            metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        conditions = [{"type": "Ready", "status": str(self.is_ready)}]
        status = {"phase": "Running", "podIP": self.ip, "podIPs": [{"ip": self.ip}], "conditions": conditions}
        whole = {**self.plain, "metadata": metadata, "spec": spec, "status": status}
        return json.dumps(whole, default=str, indent=1)


class Cluster:
    """Pods and manifests of a lab. *folder* is what the proxy reads. ``paths``: what the user gave, in order."""

    def __init__(self, network: ServiceLab, folder: Path) -> None:
        self._network = network
        self._folder = folder
        self._lock = asyncio.Lock()
        self._devices = 0
        self._made: Counter[NamespacedName] = Counter()
        self._scaled: dict[NamespacedName, tuple[int, int]] = {}  # replicas asked for, and those of the manifest then
        self._restarts: Counter[NamespacedName] = Counter()
        self._deleted: set[tuple[str, NamespacedName]] = set()
        self._seen: object = None
        self._good: dict[str, tuple[list[Manifest], str]] = {}  # file -> what `read` has returned without a fault
        self._known: set[tuple[str, NamespacedName]] = set()
        self._written: dict[str, str] = {}
        self._is_served = True  # whether the proxy has served what was written
        self.paths: list[str] = []
        self.pods: dict[NamespacedName, SimulatedPod] = {}
        self.declared = Declared({}, {}, {}, {})
        self.problem = ""
        self._is_begun = False
        self._free_ips = itertools.cycle(_ips())  # an address is not used again at once
        node = network.node
        node.set_knob("ipv4/conf/all/send_redirects", 0)
        node.set_knob(f"ipv4/conf/{BRIDGE}/send_redirects", 0)
        node.ip("route", "add", _PODS_NET, "dev", BRIDGE)

    # ---- what the user asks for

    async def declare(self, paths: Sequence[str]) -> None:
        """Write what the proxy is to read of *paths* when it starts; `begin` makes the pods meanwhile."""
        self.paths = list(paths)
        self._seen = self._look()
        self._read_manifests()
        await self._make_wanted_pods()

    async def begin(self) -> None:
        """Make the pods that were declared."""
        for pod in self.pods.values():
            await self._begin(pod)
        self._is_begun = True

    async def follow(self) -> None:
        """Reconcile when a manifest changes. Runs until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            if self._seen != self._look():
                try:
                    await self.reconcile()
                except (OSError, *_SHAPE_ERRORS, subprocess.SubprocessError) as error:
                    self.problem = f"a change could not be followed: {error!r}"

    def workload(self, key: NamespacedName) -> Workload:
        """Return the workload *key* with the replicas that it has now. Raises KeyError."""
        found = self.declared.workloads[key]
        replicas, written = self._scaled.get(key, (found.replicas, found.replicas))
        return replace(found, replicas=replicas) if written == found.replicas else found

    async def scale(self, key: NamespacedName, replicas: int) -> None:
        """Give the workload *key* this number of replicas. Raises KeyError."""
        self._scaled[key] = replicas, self.declared.workloads[key].replicas
        await self.reconcile()

    async def restart(self, key: NamespacedName) -> None:
        """Replace the pods of the workload *key* one by one."""
        self._restarts[key] += 1
        await self.reconcile()

    async def delete(self, kind: str, key: NamespacedName) -> None:
        """Delete the object; a pod of a workload is replaced.

        Raises:
            KeyError: there is no such object.
        """
        if kind == "Pod" and (pod := self.pods.get(key)) is not None and pod.owner is not None:
            if not pod.is_terminating:
                self._end(pod)
        elif (kind, key) in self._known - self._deleted:
            self._deleted.add((kind, key))
        else:
            raise KeyError(key)
        await self.reconcile()

    async def apply(self, path: str) -> None:
        """Serve the manifests in *path*, too; an object that was deleted by name is back.

        Raises:
            ConfigError: a document cannot be read. Nothing has changed.
        """
        files = [read(file, read_file(file)) for file in expand(path)]
        if fault := next((fault for _, _, fault in files if fault), ""):
            raise ConfigError(fault)
        for found, _, _ in files:
            self._deleted -= {(one.kind, one.name) for one in found}
        self.paths = [*self.paths, path] if path not in self.paths else self.paths
        await self.reconcile()

    async def leave(self, path: str, grace_s: float = GRACE_S) -> None:
        """Stop serving the manifests in *path*; their pods end after *grace_s*.

        Raises:
            ValueError: *path* is not served.
        """
        self.paths.remove(path)
        await self.reconcile(grace_s)

    async def show(self, pod: SimulatedPod, *, is_ready: bool) -> None:
        """Set whether *pod* is ready."""
        pod.is_ready = is_ready
        self._write_pod(pod)
        await self._synced()

    def harm(self, pod: SimulatedPod, trouble: str) -> None:
        """Break *pod* without telling the API: *trouble* is "Dead", "Hangs" or another value (network lost)."""
        pod.trouble = trouble
        if trouble == "Dead":
            pod.server.kill()
        elif trouble == "Hangs":
            pod.server.hangs = True
        else:
            pod.host.ip("link", "set", "eth0", "down")

    async def revive(self, pod: SimulatedPod) -> None:
        """Start the server of *pod* again and set the pod ready."""
        pod.trouble = ""
        pod.server.thaw()
        pod.host.ip("link", "set", "eth0", "up")
        pod.host.ip("route", "replace", "default", "via", GATEWAY, "dev", "eth0", "onlink")
        await self._serve(pod)
        await self.show(pod, is_ready=True)

    # ---- reconciliation

    def _look(self) -> object:
        seen = []
        for path in self.paths:
            with contextlib.suppress(OSError):
                for file in expand(path):
                    stat = Path(file).stat()
                    seen.append((file, stat.st_mtime_ns, stat.st_size))
        return seen

    async def reconcile(self, grace_s: float = GRACE_S) -> None:
        """Make the pods and the proxy's folder match the manifests, and wait until the proxy serves this state."""
        async with self._lock:
            self._seen = self._look()
            self.problem = ""
            self._read_manifests()
            for pod in [*self.pods.values()]:
                if not pod.is_terminating and not self._is_wanted(pod):
                    self._end(pod, grace_s)
            await self._make_wanted_pods()
            for pod in self.pods.values():
                if not pod.trouble and not pod.is_terminating:
                    await self._serve(pod)
            await self._synced()

    def _read_manifests(self) -> None:
        manifests: list[Manifest] = []
        texts: dict[str, str] = {}
        self._known.clear()
        for path in self.paths:
            try:
                for file in expand(path):
                    found, rest = self._read_file(file)
                    self._known |= {(one.kind, one.name) for one in found}
                    manifests += [one for one in found if self._is_kept(one)]
                    if any(not self._is_kept(one) for one in found):
                        kept = [one.plain for one in found if self._is_kept(one) and one.kind != "Pod"]
                        rest = "".join(f"---\n{json.dumps(plain, default=str)}\n" for plain in kept)
                    texts[f"{len(texts):03}-{Path(file).name}"] = rest
            except (OSError, ConfigError, UnicodeDecodeError) as error:
                self.problem = f"{path}: {error}"
        try:
            self.declared = declared(manifests)
        except _SHAPE_ERRORS as error:
            self.problem = f"a manifest cannot be simulated: {error!r}; `userspace-proxy check` says what is wrong"
        for name in [name for name in self._written if not name.startswith(_POD_FILE) and name not in texts]:
            self._unlink(name)
        for name, text in texts.items():
            self._write(name, text)

    def _read_file(self, file: str) -> tuple[list[Manifest], str]:
        """Return the objects of *file*, and what the proxy gets of it: as before, if a document cannot be read now."""
        found, rest, fault = read(file, read_file(file))
        if fault:
            self.problem = fault
            return self._good.get(file, (found, rest))
        self._good[file] = found, rest
        return found, rest

    def _is_kept(self, manifest: Manifest) -> bool:
        return (manifest.kind, manifest.name) not in self._deleted

    def _is_wanted(self, pod: SimulatedPod) -> bool:
        if pod.plain is None:
            return pod.ip in self.declared.addresses
        return pod.owner in self.declared.workloads if pod.owner else pod.key in self.declared.pods

    async def _make_wanted_pods(self) -> None:
        for key, plain in self.declared.pods.items():
            with self._noted_problem():
                await self._make_or_change(key, plain)
        for key in self.declared.workloads:
            with self._noted_problem():
                while await self._step(self.workload(key)):
                    pass
        taken = {pod.ip for pod in self.pods.values()}
        for ip in self.declared.addresses.keys() - taken:
            with self._noted_problem():
                await self._make(NamespacedName("", ip), None, ip)

    @contextlib.contextmanager
    def _noted_problem(self) -> Iterator[None]:
        """Note why one pod or workload cannot be simulated; the others are."""
        try:
            yield
        except ConfigError as error:
            self.problem = str(error)

    async def _make_or_change(self, key: NamespacedName, plain: Mapping[str, Any]) -> None:
        await self._gone(key)
        if key not in self.pods:
            await self._make(key, plain, _fixed_ip(plain), is_ready=_is_ready(plain))
        elif (pod := self.pods[key]).plain != plain:
            if pod.plain is not None and _is_ready(plain) != _is_ready(pod.plain):
                pod.is_ready = _is_ready(plain)
            pod.plain = plain
            self._write_pod(pod)

    async def _step(self, workload: Workload) -> bool:
        """Make or end one pod of *workload*; return whether more may be missing."""
        revision = workload.revision(self._restarts[workload.key])
        ours = [pod for pod in self.pods.values() if pod.owner == workload.key and not pod.is_terminating]
        old = [pod for pod in ours if pod.revision != revision]
        new = [pod for pod in ours if pod.revision == revision]
        is_numbered = workload.kind == "StatefulSet"
        if len(ours) > workload.replicas or (old and is_numbered):
            # Old ones first, and of these the ones that do not serve.
            victim = max(old or new, key=lambda pod: (not pod.is_ready or pod.trouble != "", pod.number))
            self._end(victim)
            if old:
                await asyncio.sleep(_ROLL_PAUSE_S)
        elif len(new) < workload.replicas:
            numbers = {pod.number for pod in new}
            number = min(set(range(len(new) + 1)) - numbers) if is_numbered else self._made[workload.key]
            self._made[workload.key] += 1
            plain = workload.pod(revision, number)
            key = NamespacedName(plain["metadata"]["namespace"], plain["metadata"]["name"])
            await self._gone(key)
            await self._make(key, plain, owner=workload.key, revision=revision, number=number)
            if old:
                await self._synced()
                await asyncio.sleep(_ROLL_PAUSE_S)
        else:
            return False
        return True

    # ---- one pod

    async def _make(self, key: NamespacedName, plain: Mapping[str, Any] | None, ip: str = "", **of_pod: Any) -> None:
        if len(self.pods) >= PODS_MAX:
            raise ConfigError(f"the lab has room for {PODS_MAX} pods; {key} is not simulated")
        if plain is not None and not _can_be_named(key):
            raise ConfigError(f"pod {printable(str(key), 100)} is not simulated: its name is not valid")
        taken = {pod.ip for pod in self.pods.values()}
        if not ip or ip in taken:
            ip = next(free for free in self._free_ips if free not in taken)
        has_plain_name = key.namespace in ("", "default") and key.name not in _OTHER_HOSTS
        host = Host(key.name if has_plain_name else f"{key.namespace}.{key.name}")
        pod = SimulatedPod(key, ip, host, PodServer(key.name, host, ip), plain, started_at=time.time(), **of_pod)
        self.pods[key] = pod
        if self._is_begun:
            await self._begin(pod)
        self._write_pod(pod)

    async def _begin(self, pod: SimulatedPod) -> None:
        self._devices += 1
        await asyncio.to_thread(self._add_host, pod.host, f"pod{self._devices}", pod.ip)
        await self._serve(pod)

    def _add_host(self, host: Host, device: str, ip: str) -> None:
        lab, node = self._network.lab, self._network.node
        lab.add(host.name)
        lab.attach(host, node, device)
        # Pods reach each other by way of the node, so that its rules translate answers between them, too.
        host.ip("address", "add", f"{ip}/32", "dev", "eth0")
        host.ip("route", "add", "default", "via", GATEWAY, "dev", "eth0", "onlink")
        node.ip("route", "replace", ip, "dev", BRIDGE)

    async def _serve(self, pod: SimulatedPod) -> None:
        ports = self.declared.addresses.get(pod.ip, frozenset())
        try:
            if pod.plain is not None:
                ports |= self.declared.ports(pod.plain)
            await pod.server.serve(ports)
        except (*_SHAPE_ERRORS, OSError) as error:
            self.problem = f"pod {pod.key} serves nothing: {error!r}; `userspace-proxy check` says what is wrong"

    def _end(self, pod: SimulatedPod, grace_s: float = GRACE_S) -> None:
        """End *pod* as the kubelet does: it is terminating, answers for a grace period, and is gone."""
        pod.ending = asyncio.create_task(self._remove(pod, grace_s), name=f"end pod {pod.key}")
        self._write_pod(pod)

    async def _remove(self, pod: SimulatedPod, grace_s: float) -> None:
        await asyncio.sleep(grace_s)
        pod.server.kill()
        await asyncio.to_thread(self._remove_host, pod)
        if pod.plain is not None:
            self._unlink(_file_name(pod))
        del self.pods[pod.key]

    def _remove_host(self, pod: SimulatedPod) -> None:
        node = self._network.node
        node.ip("route", "del", pod.ip, "dev", BRIDGE)
        node.ip("neighbour", "flush", "to", pod.ip, "dev", BRIDGE)  # the next pod there has another MAC address
        self._network.lab.remove(pod.host)

    async def _gone(self, key: NamespacedName) -> None:
        """Wait until a pod *key* that is terminating is gone."""
        if key in self.pods and (ending := self.pods[key].ending) is not None:
            await asyncio.wait([ending])

    def _write_pod(self, pod: SimulatedPod) -> None:
        if pod.plain is not None:
            self._write(_file_name(pod), pod.manifest())

    def _write(self, name: str, text: str) -> None:
        """Replace a file of the proxy's folder whole, unless it has this text."""
        if self._written.get(name) == text:
            return
        written = self._folder / f".{name}"
        written.write_text(text)
        written.rename(self._folder / name)
        self._written[name] = text
        self._is_served = False

    def _unlink(self, name: str) -> None:
        (self._folder / name).unlink()
        del self._written[name]
        self._is_served = False

    async def _synced(self) -> None:
        """Wait until the proxy has served what was written before this call, or until nothing was to be done."""
        if self._is_served:
            return
        asked_at, node, answers, since = time.time(), self._network.node, 0, 0
        last_queued = 0.0
        self._is_served = True
        while time.time() - asked_at < _SYNC_TIMEOUT_S:
            await asyncio.sleep(_POLL_S)
            try:
                queued, synced = await asyncio.to_thread(_timestamps, node)
            except TimeoutError:
                continue
            except OSError:
                return  # the proxy is not running, and reads everything when it starts
            answers += 1
            if queued != last_queued:
                last_queued, since = queued, answers
            needed = _ANSWERS_WITHOUT_ANOTHER if queued > asked_at else _ANSWERS_WITHOUT_CHANGE
            if answers - since >= needed and (synced > queued or queued <= asked_at):
                return


def _timestamps(node: Host) -> tuple[float, float]:
    """Return when the proxy on *node* queued its last change, and when it finished its last sync."""
    with connect(node, "127.0.0.1", _METRICS_PORT, timeout_s=1.0) as sock:
        sock.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        with sock.makefile("rb") as stream:
            return timestamps(stream.read())


def timestamps(metrics: bytes) -> tuple[float, float]:
    """Return when the last change was queued and when the last sync ended (Unix times), from the proxy's *metrics*."""
    found = {bool(queued): float(value) for queued, value in _TIMESTAMP.findall(metrics)}
    return found[True], found[False]


def _ips() -> Iterator[str]:
    """Yield addresses for pods; those of 10.244.0.0/24 are for manifests that state them."""
    return (f"10.244.{high}.{low}" for high in range(1, 255) for low in range(1, 255))


def _can_be_named(key: NamespacedName) -> bool:
    """Return whether a host and a file can have the name of this pod."""
    return all(map(SUBDOMAIN.fullmatch, (key.namespace, key.name))) and len(str(key)) <= _NAME_MAX


def _file_name(pod: SimulatedPod) -> str:
    return f"{_POD_FILE}{pod.key.namespace}-{pod.key.name}.yaml"


def _fixed_ip(plain: Mapping[str, Any]) -> str:
    ip = mapping_of(plain, "status").get("podIP") or ""
    return ip if re.fullmatch(r"(10|192\.168|172\.\d+)(\.\d+)+", str(ip)) else ""


def _is_ready(plain: Mapping[str, Any]) -> bool:
    conditions = mapping_of(plain, "status").get("conditions")
    found = [one for one in conditions if isinstance(one, dict)] if isinstance(conditions, list) else []
    return not any(one.get("type") == "Ready" and str(one.get("status")) == "False" for one in found)


def check_paths(paths: Sequence[str]) -> None:
    """Raise StartError if one of *paths* cannot be read."""
    for path in paths:
        try:
            next(expand(path), None)
        except OSError as error:
            raise StartError(f"{path}: {error.strerror}") from None
