"""A cluster as a Source: login by kubernetes_asyncio, real sockets, and kube-proxy's selectors."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import json
import os
import random
import signal
import ssl
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.apiserver import NODES, SERVICE_CIDRS, SERVICES, SLICES, ApiServer, Fault, Refusal, api_server
from tests.sources.test_reflector import QUICK
from userspace_proxy import api
from userspace_proxy.api.events import EventType, ObjectEvent
from userspace_proxy.errors import StartError
from userspace_proxy.sources import login
from userspace_proxy.sources.kubernetes import KubernetesSource, reflectors
from userspace_proxy.sources.login import ApiTransport

PATIENCE_S = 10
PROXY_NAME = "service.kubernetes.io/service-proxy-name"


def service(name: str, cluster_ip: str = "10.96.0.1", proxy: str | None = None) -> dict[str, Any]:
    labels = None if proxy is None else {PROXY_NAME: proxy}
    metadata = {"name": name, "namespace": "default", "labels": labels}
    return {"metadata": metadata, "spec": {"clusterIP": cluster_ip, "ports": [{"port": 80}]}}


def endpoint_slice(name: str, **labels: str) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": "web", **labels}}
    return {"metadata": metadata, "addressType": "IPv4", "endpoints": None, "ports": None}


def node(name: str) -> dict[str, Any]:
    return {"metadata": {"name": name}, "spec": {"taints": None}}


def is_running(pid: str) -> bool:
    """Return whether the process has not ended; one whose parent has not asked for its end does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kubeconfig(folder: Path, url: str, user: dict[str, Any] | None = None) -> Path:
    """Write a kubeconfig of *user*, by default with a token that the API server accepts."""
    file = folder / "kubeconfig"
    file.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "test",
                "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
                "clusters": [{"name": "test", "cluster": {"server": url}}],
                "users": [{"name": "test", "user": user or {}}],
            }
        )
    )
    return file


class Told:
    """The events of a source: kind -> names, and every event."""

    def __init__(self, source: KubernetesSource) -> None:
        self.source = source
        self.events: list[ObjectEvent] = []
        self.objects: dict[tuple[str, str], api.KubernetesObject] = {}

    async def follow(self) -> None:
        async with contextlib.aclosing(self.source.events()) as batches:
            async for batch in batches:
                for event in batch:
                    self.events.append(event)
                    if event.name is not None:
                        key = (event.kind, event.name.name)
                        if event.type is EventType.SET:
                            assert event.object is not None
                            self.objects[key] = event.object
                        else:
                            self.objects.pop(key, None)

    @property
    def synced(self) -> int:
        return sum(event.type is EventType.SYNCED for event in self.events)

    def names(self, kind: str) -> list[str]:
        return sorted(name for of, name in self.objects if of == kind)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def following(
    config: Path | None, *, proxy_name: str = "", synced: bool = True, node_patience_s: float = PATIENCE_S
) -> AsyncIterator[Told]:
    transport = ApiTransport(*([config] if config else []))
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(transport.close)
        await transport.open()
        following_ = reflectors(transport, "node-1", proxy_name, QUICK, random.Random(1))
        told = Told(KubernetesSource(following_, node_patience_s))
        task = asyncio.create_task(told.follow())
        try:
            if synced:
                await told.until(lambda: told.synced > 0 or task.done())
            yield told
        finally:
            task.cancel()
            (ended,) = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(ended, asyncio.CancelledError), ended


@pytest.fixture
async def server() -> AsyncIterator[ApiServer]:
    async with api_server() as running:
        yield running


@pytest.fixture
def config(server: ApiServer, tmp_path: Path) -> Path:
    return kubeconfig(tmp_path, server.url)


# ---- what is told


async def test_every_kind_is_listed_before_synced_is_yielded_once(server: ApiServer, config: Path) -> None:
    await server.put(SERVICES, service("web"))
    await server.put(SLICES, endpoint_slice("web-1"))
    await server.put(NODES, node("node-1"))

    async with following(config) as told:
        assert sorted(told.objects) == [("EndpointSlice", "web-1"), ("Node", "node-1"), ("Service", "web")]
        assert told.events[-1].type is EventType.SYNCED

        await server.put(SERVICES, service("db"))
        await told.until(lambda: told.names("Service") == ["db", "web"])
        await server.delete(SERVICES, "web")
        await told.until(lambda: told.names("Service") == ["db"])
        assert told.synced == 1


async def test_nothing_is_synced_before_every_kind_was_listed(server: ApiServer, config: Path) -> None:
    await server.put(SERVICES, service("web"))
    server.forbidden.add(SLICES)
    async with following(config, synced=False) as told:
        await told.until(lambda: told.names("Service") == ["web"] and bool(told.source.problems))
        assert told.synced == 0

        server.forbidden.clear()
        await told.until(lambda: told.synced == 1)


async def test_a_node_that_cannot_be_seen_is_waited_for_only_so_long(server: ApiServer, config: Path) -> None:
    server.forbidden.add(NODES)
    async with following(config, node_patience_s=0.1) as told:
        assert told.synced == 1


async def test_an_api_without_service_cidrs_or_that_denies_them_is_no_problem(
    server: ApiServer, config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.forbidden.add(SERVICE_CIDRS)
    async with following(config) as told:
        await told.until(lambda: any(path == SERVICE_CIDRS for path, _ in server.requests))
        server.forbidden.clear()
        await server.put(SERVICE_CIDRS, {"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/16"]}})
        await told.until(lambda: told.names("ServiceCIDR") == ["kubernetes"])
        assert not told.source.problems
        assert [watch.kind for watch in told.source.watches] == ["services", "endpointslices", "nodes"]

    assert "servicecidrs cannot be followed" not in caplog.text


async def test_only_our_own_node_is_asked_for(server: ApiServer, config: Path) -> None:
    await server.put(NODES, node("node-1"))
    await server.put(NODES, node("node-2"))

    async with following(config) as told:
        assert told.names("Node") == ["node-1"]


async def test_services_of_other_proxies_and_headless_ones_are_left_out(server: ApiServer, config: Path) -> None:
    await server.put(SERVICES, service("ours"))
    await server.put(SERVICES, service("theirs", proxy="other"))
    await server.put(SERVICES, service("headless", "None"))
    await server.put(SERVICES, service("unborn", ""))
    await server.put(SLICES, endpoint_slice("ours-1"))
    await server.put(SLICES, endpoint_slice("headless-1", **{"service.kubernetes.io/headless": ""}))

    async with following(config) as told:
        assert told.names("Service") == ["ours"]
        assert told.names("EndpointSlice") == ["ours-1"]

        await server.put(SERVICES, service("ours", proxy="other"))
        await told.until(lambda: told.names("Service") == [])


async def test_an_api_that_lacks_the_cluster_ip_selector_is_asked_without_it(server: ApiServer, config: Path) -> None:
    """Before Kubernetes 1.31; found with a real 1.20."""
    server.knows_watch_list = server.knows_cluster_ip_field = False
    await server.put(SERVICES, service("ours"))
    await server.put(SERVICES, service("headless", "None"))

    async with following(config) as told:
        assert told.names("Service") == ["ours"]
        await server.put(SERVICES, service("other"))
        await told.until(lambda: told.names("Service") == ["other", "ours"])
        await server.put(SERVICES, service("other", "None"))
        await told.until(lambda: told.names("Service") == ["ours"])
        await told.until(lambda: not told.source.problems)


async def test_an_older_api_server_behind_the_same_address_may_answer_the_next_watch(
    server: ApiServer, config: Path
) -> None:
    """A control plane in the middle of its upgrade."""
    async with following(config) as told:
        server.knows_watch_list = server.knows_cluster_ip_field = False
        server.cut()
        await server.put(SERVICES, service("web"))
        await told.until(lambda: told.names("Service") == ["web"])
        await told.until(lambda: not told.source.problems)


async def test_a_named_proxy_follows_exactly_the_services_that_name_it(server: ApiServer, config: Path) -> None:
    for name in ("mine", "other"):
        await server.put(SERVICES, service(name, proxy=name))
    await server.put(SERVICES, service("unnamed"))

    async with following(config, proxy_name="mine") as told:
        assert told.names("Service") == ["mine"]


# ---- what goes wrong


async def test_an_api_that_is_down_is_a_problem_with_a_time_and_deletes_nothing(
    server: ApiServer, config: Path
) -> None:
    await server.put(SERVICES, service("web"))
    async with following(config) as told:
        await server.stop()
        await told.until(lambda: len(told.source.problems) == 3)
        assert told.names("Service") == ["web"]
        assert "services cannot be followed since 20" in told.source.problems["services"]

        await server.start()
        await told.until(lambda: not told.source.problems)
        assert told.synced == 1


async def test_a_failing_watch_of_one_kind_stops_no_other(server: ApiServer, config: Path) -> None:
    async with following(config) as told:
        server.forbidden.add(SLICES)
        server.cut()
        await told.until(lambda: "endpointslices" in told.source.problems)
        await server.put(SERVICES, service("web"))
        await told.until(lambda: told.names("Service") == ["web"])


async def test_a_bug_in_one_reflector_is_raised(server: ApiServer, config: Path) -> None:
    transport = ApiTransport(config)
    await transport.open()
    following_ = reflectors(transport, "node-1", "", QUICK, random.Random(1))
    following_["Service"]._decoder = None  # type: ignore[assignment]
    await server.put(SERVICES, service("web"))
    source = KubernetesSource(following_)

    with pytest.raises(AttributeError):
        async for _ in source.events():
            pass
    await transport.close()


# ---- logging in


async def test_a_token_file_that_changes_is_read_again_after_a_refusal(server: ApiServer, tmp_path: Path) -> None:
    server.token = "first"
    token = tmp_path / "token"
    token.write_text("first\n")
    async with following(kubeconfig(tmp_path, server.url, {"tokenFile": str(token)})) as told:
        server.token = "second"
        token.write_text("second\n")
        server.faults.append(Fault.END)
        await server.put(SERVICES, service("web"))
        await told.until(lambda: told.names("Service") == ["web"])
        await told.until(lambda: not told.source.problems)


def hanging_plugin(folder: Path, last: str, pids: Path, child: str = "sleep 300") -> dict[str, Any]:
    """Return a user whose plugin starts *child*, writes its own and its process id to *pids*, and does *last*."""
    plugin = folder / "plugin"
    plugin.write_text(f"#!/bin/sh\n{child} &\necho $$ $! >{pids}.new\nmv {pids}.new {pids}\n{last}\n")
    plugin.chmod(stat.S_IRWXU)
    return {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": str(plugin)}}


def pipes() -> set[str]:
    """Return the pipes and sockets that this process holds."""
    held = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            held.add(str(link.readlink()))
    return {name for name in held if name.startswith(("pipe:", "socket:"))}


async def ended(pids: Path) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while any(map(is_running, pids.read_text().split())):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("end", ["time-out", "stop"])
@pytest.mark.parametrize("last", ["wait", "exit 0"])
async def test_a_plugin_that_hangs_is_ended_with_its_children(
    end: str, last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(login, "_LOGIN_S", 2.0 if end == "time-out" else 60.0)
    monkeypatch.setattr(login, "_has_terminal", lambda: False)
    pids = tmp_path / "pids"
    user = hanging_plugin(tmp_path, last, pids)
    before = pipes()
    opening = asyncio.create_task(ApiTransport(kubeconfig(tmp_path, "http://127.0.0.1:1", user)).open())
    async with asyncio.timeout(PATIENCE_S):
        while not pids.exists():
            await asyncio.sleep(0.01)
    if end == "stop":
        opening.cancel()
    with pytest.raises(StartError if end == "time-out" else asyncio.CancelledError):
        await opening
    await ended(pids)
    async with asyncio.timeout(PATIENCE_S):
        while pipes() - before:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("end", ["time-out", "stop"])
async def test_the_output_of_a_child_that_cannot_be_ended_is_closed(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(login, "_LOGIN_S", 2.0 if end == "time-out" else 60.0)
    monkeypatch.setattr(login, "_has_terminal", lambda: False)
    pids = tmp_path / "pids"
    user = hanging_plugin(tmp_path, "wait", pids, child="setsid sleep 300")  # in a process group of its own
    before = pipes()
    opening = asyncio.create_task(ApiTransport(kubeconfig(tmp_path, "http://127.0.0.1:1", user)).open())
    async with asyncio.timeout(PATIENCE_S):
        while not pids.exists():
            await asyncio.sleep(0.01)
    try:
        await asyncio.sleep(0.2)  # until the child has left the group
        if end == "stop":
            opening.cancel()
        with pytest.raises(StartError if end == "time-out" else asyncio.CancelledError):
            await opening
        async with asyncio.timeout(PATIENCE_S):
            while pipes() - before:
                await asyncio.sleep(0.01)
    finally:
        os.kill(int(pids.read_text().split()[1]), signal.SIGKILL)


@pytest.mark.parametrize("command", [["run"], ["forward", "svc/web", "8080:80"]])
async def test_a_stop_during_a_login_ends_process_and_plugin_at_once(command: list[str], tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    config = kubeconfig(tmp_path, "http://127.0.0.1:1", hanging_plugin(tmp_path, "wait", pids))
    arguments = [sys.executable, "-m", "userspace_proxy", *command, "--kubeconfig", str(config)]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not pids.exists():
                    await asyncio.sleep(0.01)
            process.terminate()
            _, told = process.communicate(timeout=login._LOGIN_S / 2)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "Traceback" not in told
    await ended(pids)


async def test_at_a_terminal_a_plugin_may_ask_there_and_ctrl_c_ends_it(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    user = hanging_plugin(tmp_path, "exec 3</dev/tty || kill $!\nwait", pids)
    config = kubeconfig(tmp_path, "http://127.0.0.1:1", user)
    ours, theirs = os.openpty()
    command = ["setsid", "--ctty", sys.executable, "-m", "userspace_proxy", "names", "--kubeconfig", str(config)]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not pids.exists():
                    await asyncio.sleep(0.01)
            os.write(ours, b"\x03")
            assert process.wait(PATIENCE_S) != 0
            await ended(pids)
        finally:
            process.kill()
            os.close(ours)


async def test_a_stop_during_a_login_goes_on_if_the_plugin_is_another_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill = os.killpg

    def refuse(group: int, signum: int) -> None:
        kill(group, signum)  # so that nothing is left
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(login, "_has_terminal", lambda: False)
    monkeypatch.setattr(os, "killpg", refuse)
    pids = tmp_path / "pids"
    user = hanging_plugin(tmp_path, "wait", pids)
    opening = asyncio.create_task(ApiTransport(kubeconfig(tmp_path, "http://127.0.0.1:1", user)).open())
    async with asyncio.timeout(PATIENCE_S):
        while not pids.exists():
            await asyncio.sleep(0.01)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await ended(pids)


async def test_an_exec_plugin_gives_credentials_and_is_asked_again_after_a_refusal(
    server: ApiServer, tmp_path: Path
) -> None:
    server.token = "first"
    answer = tmp_path / "answer"
    answer.write_text(credential("first"))
    plugin = tmp_path / "plugin"
    plugin.write_text(f"#!/bin/sh\ncat {answer}\n")
    plugin.chmod(stat.S_IRWXU)
    user = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": str(plugin)}}
    async with following(kubeconfig(tmp_path, server.url, user)) as told:
        server.token = "second"
        answer.write_text(credential("second"))
        server.cut()
        await server.put(SERVICES, service("web"))
        await told.until(lambda: told.names("Service") == ["web"])


def serving_tls(certificates: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(certificates / "ca.crt"))
    context.load_cert_chain(certificates / "server.crt", certificates / "server.key")
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # as an API server, which is written in Go
    return context


async def test_a_kubeconfig_with_certificates_is_heeded_both_ways(certificates: Path, tmp_path: Path) -> None:
    server = ApiServer()
    server.tls = serving_tls(certificates)
    server.tls.verify_mode = ssl.CERT_REQUIRED
    await server.start()
    try:
        client = {
            "client-certificate": str(certificates / "client.crt"),
            "client-key": str(certificates / "client.key"),
        }
        config = kubeconfig(tmp_path, server.url, client)
        async with following(config, synced=False) as told:
            await told.until(lambda: "certificate verify failed" in told.source.problems.get("services", ""))

            # The authority's certificate comes into the file, as when it is renewed: no restart is needed.
            plain = json.loads(config.read_text())
            plain["clusters"][0]["cluster"]["certificate-authority"] = str(certificates / "ca.crt")
            config.write_text(json.dumps(plain))
            await told.until(lambda: told.synced == 1)
    finally:
        await server.stop()


async def test_in_a_pod_its_service_account_is_used_and_its_token_read_again(
    certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kubernetes_asyncio.config import incluster_config

    server = ApiServer()
    server.tls = serving_tls(certificates)
    server.token = "first"
    token = tmp_path / "token"
    token.write_text("first\n")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(token))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(certificates / "ca.crt"))
    await server.start()
    try:
        host, _, port = server.url.removeprefix("https://").partition(":")
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
        async with following(None) as told:
            server.token = "second"
            token.write_text("second\n")
            server.cut()
            await server.put(SERVICES, service("web"))
            await told.until(lambda: told.names("Service") == ["web"])
    finally:
        await server.stop()


def credential(token: str) -> str:
    return json.dumps(
        {
            "apiVersion": "client.authentication.k8s.io/v1",
            "kind": "ExecCredential",
            "status": {"token": token, "expirationTimestamp": "2099-01-01T00:00:00Z"},
        }
    )


async def test_credentials_that_are_refused_for_long_are_a_problem(server: ApiServer, config: Path) -> None:
    async with following(config) as told:
        server.token = "never told"
        server.cut()
        await told.until(lambda: "401 Unauthorized" in told.source.problems.get("services", ""))


async def test_a_server_that_sends_retry_after_is_followed_afterwards(server: ApiServer, config: Path) -> None:
    server.refusals += [Refusal(429, {"Retry-After": "0"})] * 3
    async with following(config) as told:
        assert told.synced == 1


@pytest.mark.parametrize("text", ["", "a: b", "[", '{"current-context": "x", "contexts": [], "clusters": []}'])
async def test_a_kubeconfig_that_makes_no_sense_is_refused_at_once(tmp_path: Path, text: str) -> None:
    file = tmp_path / "kubeconfig"
    file.write_text(text)

    with pytest.raises(StartError, match=r"--kubeconfig .*no login: "):
        await ApiTransport(file).open()


@pytest.mark.parametrize("text", ["- " * 30_000, "[" * 30_000, "a: &a {<<: [*a]}", "a: !!bool x"])
async def test_a_kubeconfig_over_a_bound_is_refused_at_once(tmp_path: Path, text: str) -> None:
    file = tmp_path / "kubeconfig"
    file.write_text(text)

    with pytest.raises(StartError, match=r"no login: line 1: "):
        await ApiTransport(file).open()


@pytest.mark.parametrize("field", ["certificate-authority", "client-certificate", "client-key", "tokenFile"])
async def test_a_kubeconfig_that_names_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, field: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    plain = json.loads(kubeconfig(tmp_path, "https://127.0.0.1:1").read_text())
    plain["clusters"][0]["cluster"][field] = plain["users"][0]["user"][field] = "pipe"
    (tmp_path / "kubeconfig").write_text(json.dumps(plain))

    with pytest.raises(StartError, match="'pipe' is not a regular file"):
        await ApiTransport(tmp_path / "kubeconfig").open()


@pytest.mark.parametrize(
    "server",
    [
        "http://user:secret@127.0.0.1:1",
        "http://user:sec/ret@127.0.0.1:1",
        "http://127.0.0.1:1/?token=secret",
        "http://127.0.0.1:1/?secret",
    ],
)
async def test_a_password_or_token_in_the_url_of_a_server_is_shown_nowhere(tmp_path: Path, server: str) -> None:
    transport = ApiTransport(kubeconfig(tmp_path, server))
    try:
        said = await transport.open()
    except StartError as error:
        said = str(error)
    await transport.close()

    assert "ret" not in said


async def test_a_user_in_the_url_of_a_server_comes_before_a_token(tmp_path: Path) -> None:
    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sent = (await reader.readuntil(b"\r\n\r\n")).decode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()
        requests.append(sent)

    requests: list[str] = []
    async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        transport = ApiTransport(kubeconfig(tmp_path, f"http://user:sec%40ret@127.0.0.1:{port}", {"token": "t"}))
        await transport.open()
        async with transport.get("/api", {}) as response:
            assert response.status == 200
        await transport.close()

    assert f"Authorization: Basic {base64.b64encode(b'user:sec@ret').decode()}\r\n" in requests[0]


async def test_the_first_of_several_kubeconfigs_counts(tmp_path: Path) -> None:
    """As for kubectl: users may stand in another file than the context and the cluster."""
    first, second = ({"apiVersion": "v1", "kind": "Config", "users": [{"name": "me", "user": {}}]} for _ in range(2))
    for plain, port in ((first, 1), (second, 2)):
        plain["current-context"] = f"of-{port}"
        plain["contexts"] = [{"name": f"of-{port}", "context": {"cluster": "same", "user": "me"}}]
        plain["clusters"] = [{"name": "same", "cluster": {"server": f"http://127.0.0.1:{port}"}}]
    del first["users"]
    files: list[Path] = []
    for plain in (first, second):
        files.append(tmp_path / f"kubeconfig-{len(files)}")
        files[-1].write_text(json.dumps(plain))

    said = {}
    for order in (files, files[::-1]):
        transport = ApiTransport(*order)
        said[order[0]] = await transport.open()
        await transport.close()

    assert said == {files[0]: "http://127.0.0.1:1", files[1]: "http://127.0.0.1:2"}


async def test_a_kubeconfig_that_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="no such file"):
        await ApiTransport(tmp_path / "nothing").open()


async def test_in_cluster_outside_of_a_pod_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)

    with pytest.raises(StartError, match="--in-cluster: no login: Service host/port is not set"):
        await ApiTransport().open()


def test_serving_files_imports_no_cluster_library() -> None:
    code = "import sys; import userspace_proxy.runtime.app, userspace_proxy.cli.run; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert "userspace_proxy.sources.files" in loaded
    unwanted = ("kubernetes_asyncio", "userspace_proxy.sources.kubernetes", "userspace_proxy.sources.reflector")
    assert not [name for name in loaded if name.startswith(unwanted)]


def test_a_login_imports_no_models_and_leaves_them_to_later_imports(tmp_path: Path) -> None:
    config = kubeconfig(tmp_path, "http://127.0.0.1:1")
    code = f"""
import asyncio, sys
from pathlib import Path
from userspace_proxy.sources.login import ApiTransport
print(asyncio.run(ApiTransport(Path({str(config)!r})).open()))
print(*(name for name in sys.modules if name.startswith("kubernetes_asyncio")))
from kubernetes_asyncio import watch
from kubernetes_asyncio.client import models
print(models.V1Service.__module__, watch.Watch.__module__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    url, loaded, later = done.stdout.splitlines()

    assert url == "http://127.0.0.1:1"
    assert "kubernetes_asyncio.config.kube_config" in loaded
    assert not [name for name in loaded.split() if ".models" in name or ".api." in name]
    assert later == "kubernetes_asyncio.client.models.v1_service kubernetes_asyncio.watch.watch"


def hold_certificates(config: Path, certificates: Path) -> None:
    """Write the certificates themselves into the kubeconfig *config*, as kubeadm does."""

    def inline(name: str) -> str:
        return base64.b64encode((certificates / name).read_bytes()).decode()

    plain = json.loads(config.read_text())
    plain["clusters"][0]["cluster"]["certificate-authority-data"] = inline("ca.crt")
    plain["users"][0]["user"] = {
        "client-certificate-data": inline("client.crt"),
        "client-key-data": inline("client.key"),
    }
    config.write_text(json.dumps(plain))


async def test_certificates_that_a_kubeconfig_holds_are_left_nowhere(
    certificates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (leftovers := tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(leftovers))
    server = ApiServer()
    server.tls = serving_tls(certificates)
    server.tls.verify_mode = ssl.CERT_REQUIRED
    await server.start()
    try:
        hold_certificates(config := kubeconfig(tmp_path, server.url), certificates)
        transport = ApiTransport(config)
        await transport.open()
        assert list(leftovers.iterdir()) == [], "nothing would remove them if this process were killed"
        async with transport.get(SERVICES, {}) as response:
            assert response.status == 200
        await transport.close()
    finally:
        await server.stop()
