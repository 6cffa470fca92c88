"""The commands of the lab's shell that act on simulated pods: scale, kill-pod, unready, restart, apply and others.

They are read as kubectl reads them: ``scale deployment/web --replicas=3`` is the same as ``scale web 3``.
"""

import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from userspace_proxy.errors import ConfigError
from userspace_proxy.lab.cluster import GRACE_S, Cluster, SimulatedPod
from userspace_proxy.lab.workloads import WORKLOADS, Workload
from userspace_proxy.model.names import NamespacedName
from userspace_proxy.modes import MODES

_ALIASES = {"deploy": "deployment", "rs": "replicaset", "sts": "statefulset", "ds": "daemonset", "po": "pod"}
_ALIASES |= {"rc": "replicationcontroller", "svc": "service", "ep": "endpoints"}
_HARM = {
    "Dead": "is dead: it refuses connections",
    "Hangs": "hangs: it accepts connections and answers nothing",
    "Silent": "has lost its network: nothing answers there",
}
_WITH_VALUE = ("-n", "--namespace", "-f", "--filename", "-l", "--selector", "-o", "--output", "-c", "--replicas")
NO_MODE = "none"  # the proxy does not run
_KINDS = {kind.lower(): kind for kind in (*WORKLOADS, "Pod", "Service", "Endpoints", "EndpointSlice")}


_Named = TypeVar("_Named", SimulatedPod, Workload)


class WordError(Exception):
    """A command that cannot be executed: the reason, for the user."""


class Request(NamedTuple):
    """One command of the lab's shell, as typed in ``folder``: names of objects, their kinds, and options."""

    names: list[str]
    kinds: list[str]
    options: Mapping[str, str]
    folder: Path

    @property
    def namespace(self) -> str:
        return self.option("-n", "--namespace") or "default"

    def option(self, *names: str) -> str:
        """Return the value of an option by its *names*, or "" if it is not given."""
        return next((self.options[name] for name in names if name in self.options), "")

    def selects(self, pod: SimulatedPod) -> bool:
        """Return whether *pod* has all requested labels (``NAME=VALUE,...``)."""
        labels = (pod.plain or {}).get("metadata", {}).get("labels") or {}
        pairs = (pair.partition("=") for pair in self.option("-l", "--selector").split(",") if pair)
        return all(labels.get(name) == value.lstrip("=") for name, _, value in pairs)

    def named(self, found: list[_Named]) -> list[_Named]:
        """Return those of *found* with a requested name, or all if no name is requested.

        To `describe`, the beginning of a name is enough if no object has that name itself.
        """
        if not self.names:
            return found
        exact = {each.key.name for each in found}.intersection(self.names)
        beginnings = tuple(set(self.names) - exact) if "--describe" in self.options else ()
        return [each for each in found if each.key.name in exact or each.key.name.startswith(beginnings)]

    def key(self, at: int = 0) -> NamespacedName:
        if len(self.names) <= at:
            raise WordError("a name is missing")
        return NamespacedName(self.namespace, self.names[at])


def parse(arguments: Sequence[str], folder: Path) -> Request:
    """Return *arguments*, typed in *folder*, as a request.

    ``deployment web`` and ``deploy/web`` name the same object.
    """
    words: list[str] = []
    options: dict[str, str] = {}
    rest = iter(arguments)
    for word in rest:
        if word == "--":  # a command for a pod follows
            options[word] = "yes"
            break
        if word.startswith("-") and word != "-":
            name, equals, value = word.partition("=")
            if name in ("-f", "--filename") and options.keys() & {"-f", "--filename"}:
                raise WordError("give one -f; a folder stands for all its files")
            options[name] = value if equals else next(rest, "") if name in _WITH_VALUE else "yes"
        else:
            words.append(word)
    return Request(*_names_and_kinds(words), options, folder)


def _names_and_kinds(words: Sequence[str]) -> tuple[list[str], list[str]]:
    if words and (kind := _kind_of(words[0])):
        return [*words[1:]], [kind]
    parts = [word.partition("/") for word in words]
    kinds = [_kind_of(kind) if slash else "" for kind, slash, _ in parts]
    names = [name if kind else word for word, kind, (_, _, name) in zip(words, kinds, parts, strict=True)]
    return names, [kind for kind in kinds if kind]


def _kind_of(word: str) -> str:
    word = word.lower()
    word = _ALIASES.get(word, word)
    return _KINDS.get(word) or _KINDS.get(word.removesuffix("s"), "")


class Words:
    """Executes the commands of the lab's shell. *set_mode* starts the proxy again in another mode."""

    def __init__(self, cluster: Cluster, set_mode: Callable[[str], Awaitable[None]]) -> None:
        self._cluster = cluster
        self._set_mode = set_mode
        self._words: Mapping[str, Callable[[Request], Awaitable[str]]] = {
            "scale": self._scale,
            "kill-pod": self._kill_pod,
            "unready": self._unready,
            "ready": self._ready,
            "restart": self._restart,
            "apply": self._apply,
            "delete": self._delete,
            "get": self._get,
            "mode": self._mode,
            "exec": self._exec,
        }

    @property
    def names(self) -> Iterable[str]:
        return self._words.keys()

    async def obey(self, word: str, arguments: Sequence[str], folder: Path) -> str:
        """Execute the command *word* with *arguments*, typed in *folder*; return the text to print.

        Raises:
            WordError: the command cannot be executed; the message says why.
        """
        try:
            said = await self._words[word](parse(arguments, folder))
        except (OSError, ConfigError, UnicodeDecodeError) as error:
            raise WordError(str(error)) from None
        warns = self._cluster.problem and word != "exec"  # the shell runs a command in what `exec` names
        return f"{said}\nwarning: {self._cluster.problem}" if warns else said

    # ---- the words

    async def _scale(self, request: Request) -> str:
        *names, last = [*request.names, request.options.get("--replicas", "")]
        number = last or (names.pop() if len(names) > 1 else "")
        if len(names) != 1 or not number.isdecimal():
            raise WordError("usage: scale NAME N")
        key = self._workload(NamespacedName(request.namespace, names[0]))
        await self._cluster.scale(key, int(number))
        return f"{key.name} scaled to {number}"

    async def _kill_pod(self, request: Request) -> str:
        pod = self._pod(request, lambda pod: pod.is_ready and not pod.trouble)
        trouble = "Hangs" if "--hang" in request.options else "Silent" if "--silent" in request.options else "Dead"
        self._cluster.harm(pod, trouble)
        return f"{pod.key.name} ({pod.ip}) {_HARM[trouble]}; the API does not know it. `ready` ends that"

    async def _unready(self, request: Request) -> str:
        pod = self._pod(request, lambda pod: pod.is_ready and pod.trouble != "", lambda pod: pod.is_ready)
        await self._cluster.show(pod, is_ready=False)
        return f"{pod.key.name} ({pod.ip}) is not ready: it gets no new connections"

    async def _ready(self, request: Request) -> str:
        pod = self._pod(request, lambda pod: not pod.is_ready or pod.trouble != "")
        await self._cluster.revive(pod)
        return f"{pod.key.name} ({pod.ip}) is ready"

    async def _restart(self, request: Request) -> str:
        key = request.key()
        if key in self._cluster.declared.workloads:
            await self._cluster.restart(key)
            return f"{key.name} restarted: every pod was replaced, one by one"
        pod = self._pod(request)
        await self._cluster.show(pod, is_ready=False)
        self._cluster.harm(pod, "Dead")
        await self._cluster.revive(pod)
        return f"{pod.key.name} ({pod.ip}) restarted"

    async def _apply(self, request: Request) -> str:
        path = self._path(request)
        await self._cluster.apply(path)
        return f"{path} applied"

    async def _delete(self, request: Request) -> str:
        if request.option("-f", "--filename"):
            path = self._path(request)
            try:
                await self._cluster.leave(path, 0.0 if "--now" in request.options else GRACE_S)
            except ValueError:
                raise WordError(
                    f"{path} was not applied; applied: {', '.join(self._cluster.paths) or 'none'}"
                ) from None
            return f"{path} deleted"
        if not request.kinds or not request.names:
            raise WordError("usage: delete KIND NAME, or delete -f PATH")
        return await self._delete_named(request)

    async def _delete_named(self, request: Request) -> str:
        kinds = request.kinds if len(request.kinds) == len(request.names) else request.kinds[:1] * len(request.names)
        said: list[str] = []
        for at, kind in enumerate(kinds):
            key = request.key(at)
            try:
                await self._cluster.delete(kind, key)
            except KeyError:
                raise WordError("\n".join([*said, f"there is no {kind} {key}"])) from None
            said.append(f"{kind.lower()}/{key.name} deleted")
        return "\n".join(said)

    async def _get(self, request: Request) -> str:
        if request.names and not request.kinds:
            raise WordError(f"the lab has no {request.names[0]}; it has pods, deployments, services and endpoints")
        kind = request.kinds[0] if request.kinds else "Pod"
        everywhere = bool(request.options.keys() & {"-A", "--all-namespaces"})
        if kind == "Pod":
            pods = [pod for pod in self._cluster.pods.values() if everywhere or pod.key.namespace == request.namespace]
            pods = [pod for pod in request.named(pods) if request.selects(pod)]
            if pods and request.option("-o", "--output") in ("json", "yaml"):
                return "\n---\n".join(pod.manifest() for pod in pods if pod.plain is not None)
            rows = [("NAME", "READY", "STATUS", "AGE", "IP"), *(_row(pod) for pod in pods)]
        else:
            found = [self._cluster.workload(key) for key in self._cluster.declared.workloads]
            found = [
                one for one in found if one.kind == kind and (everywhere or one.key.namespace == request.namespace)
            ]
            found = request.named(found)
            rows = [("NAME", "READY"), *((one.key.name, f"{self._ready_of(one.key)}/{one.replicas}") for one in found)]
        if len(rows) == 1 and request.names and "--describe" in request.options:
            raise WordError(f"there is no {kind} {request.key()}")
        if len(rows) == 1:
            return f"No {kind}s found in namespace {request.namespace}."
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("   ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)

    async def _mode(self, request: Request) -> str:
        if not request.names:
            raise WordError(f"usage: mode {'|'.join((*MODES, NO_MODE))}")
        await self._set_mode(mode := request.names[0])
        return (
            "the proxy has ended; `mode userspace` starts it again"
            if mode == NO_MODE
            else f"the proxy serves in {mode} mode"
        )

    async def _exec(self, request: Request) -> str:
        """Return the network namespace of a pod, for the shell to run the command in."""
        if "--" not in request.options:
            raise WordError("usage: exec POD -- COMMAND")
        return self._pod(request, lambda pod: not pod.trouble).host.name

    # ---- what a word names

    def _pod(self, request: Request, *conditions: Callable[[SimulatedPod], bool]) -> SimulatedPod:
        """Return the pod that *request* names, by its name or address; or a workload's, by the first condition met."""
        key, pods = request.key(), self._cluster.pods
        for pod in pods.values():
            if key == pod.key or key.name == pod.ip:
                return pod
        for condition in conditions:
            for pod in pods.values():
                if pod.owner == key and not pod.is_terminating and condition(pod):
                    return pod
        raise WordError(
            f"there is no such pod {key}; pods: {', '.join(pod.key.name for pod in pods.values()) or 'none'}"
        )

    def _workload(self, key: NamespacedName) -> NamespacedName:
        if key not in self._cluster.declared.workloads:
            known = ", ".join(map(str, self._cluster.declared.workloads)) or "none"
            raise WordError(f"there is no workload {key} with replicas; known: {known}")
        return key

    def _path(self, request: Request) -> str:
        path = request.option("-f", "--filename")
        if not path or "://" in path:
            raise WordError("usage: apply -f PATH; the lab has no network outside, so download a file first")
        return str((request.folder / path).resolve())

    def _ready_of(self, key: NamespacedName) -> int:
        return sum(pod.owner == key and pod.is_ready and not pod.is_terminating for pod in self._cluster.pods.values())


def _row(pod: SimulatedPod) -> tuple[str, ...]:
    is_ready = pod.is_ready and pod.plain is not None
    return pod.key.name, f"{is_ready:d}/1", pod.state, f"{time.time() - pod.started_at:.0f}s", pod.ip
