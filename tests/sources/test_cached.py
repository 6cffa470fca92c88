"""The saved state of a cluster: when a source begins with it, and how the API server's answers replace it."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.apiserver import NODES, SERVICES, SLICES, ApiServer, api_server
from tests.sources.test_kubernetes import kubeconfig
from userspace_proxy import api
from userspace_proxy.api.events import EventType, ObjectEvent
from userspace_proxy.sources import cached
from userspace_proxy.sources.cached import CachedSource, CacheSettings
from userspace_proxy.sources.kubernetes import KubernetesSource, reflectors
from userspace_proxy.sources.login import ApiTransport
from userspace_proxy.sources.paths import replace_file
from userspace_proxy.sources.reflector import Pace

SOON_S = 20.0
Objects = dict[str, Any]


def settings(folder: Path, **other: Any) -> CacheSettings:
    usual = CacheSettings(folder / "cluster-state", "https://api on node node-1", "node-1", "boot", 0.0, "ours/")
    return usual._replace(**other)


class Follower:
    """Follows a `CachedSource` over a real API server, and keeps what it has reported."""

    def __init__(self, folder: Path, server: ApiServer, kept: CacheSettings) -> None:
        self._transport = ApiTransport(kubeconfig(folder, server.url))
        following = reflectors(self._transport, "node-1", "", Pace(), random.Random(1))
        self.source = CachedSource(KubernetesSource(following), kept)
        self.objects: dict[tuple[str, str], api.KubernetesObject] = {}
        self.deleted: list[str] = []
        self.synced = 0

    async def follow(self) -> None:
        await self._transport.open()
        async for batch in self.source.events():
            for event in batch:
                self._take(event)

    def _take(self, event: ObjectEvent) -> None:
        if event.type is EventType.SYNCED:
            self.synced += 1
        elif event.name is not None:
            key = (event.kind, event.name.name)
            if event.object is None:
                self.objects.pop(key, None)
                self.deleted.append(event.name.name)
            else:
                self.objects[key] = event.object

    async def close(self) -> None:
        await self._transport.close()

    def endpoints(self, name: str) -> list[str]:
        piece = self.objects["EndpointSlice", name]
        assert isinstance(piece, api.EndpointSlice)
        return [address for endpoint in piece.endpoints or () for address in endpoint.addresses or ()]


@contextlib.asynccontextmanager
async def following(folder: Path, server: ApiServer, kept: CacheSettings) -> AsyncIterator[Follower]:
    follower = Follower(folder, server, kept)
    task = asyncio.create_task(follower.follow())
    try:
        yield follower
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await follower.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(SOON_S):
        while not condition():
            await asyncio.sleep(0.01)


async def serve(server: ApiServer, name: str, *addresses: tuple[str, str]) -> None:
    """Bring a Service with endpoints: address and node of each."""
    metadata = {"name": name, "namespace": "default"}
    annotations = {"ours/balance": "random", "token": "secret"}
    spec = {"clusterIP": "10.96.0.7", "ports": [{"port": 80}]}
    await server.put(SERVICES, {"metadata": {**metadata, "annotations": annotations}, "spec": spec})
    endpoints = [{"addresses": [address], "nodeName": node} for address, node in addresses]
    labels = {"kubernetes.io/service-name": name}
    slice_ = {"addressType": "IPv4", "endpoints": endpoints, "ports": [{"port": 8080}]}
    await server.put(SLICES, {"metadata": {**metadata, "labels": labels}, **slice_})


@pytest.fixture
async def kept(tmp_path: Path) -> AsyncIterator[ApiServer]:
    """A stopped API server, whose state with the Services web and old a source has kept in *tmp_path*."""
    async with api_server() as server:
        await server.put(NODES, {"metadata": {"name": "node-1"}})
        await serve(server, "web", ("10.244.0.2", "node-1"), ("10.244.1.2", "node-2"))
        await serve(server, "old", ("10.244.1.3", "node-2"))
        async with following(tmp_path, server, settings(tmp_path)) as follower:
            await until((tmp_path / "cluster-state").exists)
            assert follower.source.stale == ""
        await server.stop()
        yield server


async def test_the_file_is_for_its_owner_alone_and_has_no_foreign_annotations(tmp_path: Path, kept: ApiServer) -> None:
    file = tmp_path / "cluster-state"

    assert file.stat().st_mode & 0o777 == 0o600
    assert b"secret" not in file.read_bytes()
    assert b"ours/balance" in file.read_bytes()


async def test_without_the_api_server_the_kept_state_is_reported(tmp_path: Path, kept: ApiServer) -> None:
    began_at = time.monotonic()
    async with following(tmp_path, kept, settings(tmp_path)) as follower:
        await until(lambda: follower.synced)

        assert time.monotonic() - began_at < 10.0
        assert follower.endpoints("web") == ["10.244.0.2", "10.244.1.2"]
        assert ("Node", "node-1") in follower.objects
        assert "has not answered since the start; the state of" in follower.source.stale


async def test_a_server_that_takes_connections_and_is_silent_is_not_waited_for(tmp_path: Path, kept: ApiServer) -> None:
    kept.is_frozen = True
    await kept.start()
    async with following(tmp_path, kept, settings(tmp_path)) as follower:
        await until(lambda: follower.synced)

        assert follower.endpoints("web") == ["10.244.0.2", "10.244.1.2"]


async def test_answers_of_the_api_server_replace_the_saved_state(tmp_path: Path, kept: ApiServer) -> None:
    async with following(tmp_path, kept, settings(tmp_path)) as follower:
        await until(lambda: follower.synced)
        await kept.delete(SERVICES, "old")
        await kept.delete(SLICES, "old")
        await serve(kept, "web", ("10.244.1.9", "node-2"))
        await kept.start()
        await until(lambda: follower.source.stale == "" and follower.synced == 2)

        assert follower.endpoints("web") == ["10.244.1.9"]
        assert sorted(follower.deleted) == ["old", "old"]
        assert ("Service", "web") in follower.objects


async def test_after_a_reboot_endpoints_of_this_node_are_not_used(tmp_path: Path, kept: ApiServer) -> None:
    async with following(tmp_path, kept, settings(tmp_path, boot_id="another")) as follower:
        await until(lambda: follower.synced)

        assert follower.endpoints("web") == ["10.244.1.2"]


def _damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _age(file: Path) -> None:
    os.utime(file, (0, time.time() - 100))


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _nothing(file: Path) -> None:
    """Leave *file* as it is."""


@pytest.mark.parametrize(
    ("change", "other", "why"),
    [
        (_damage, {}, "it is damaged"),
        (lambda file: file.write_bytes(b""), {}, "it is damaged"),
        (_age, {"max_age_s": 99.0}, "it is older than --max-state-age"),
        (_pipe, {}, "it is no regular file"),
        (_nothing, {"origin": "https://other on node node-1"}, "it is of https://api on node node-1"),
    ],
)
async def test_a_file_that_cannot_be_used_is_named_and_ignored(
    tmp_path: Path,
    kept: ApiServer,
    change: Callable[[Path], object],
    other: dict[str, Any],
    why: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    change(tmp_path / "cluster-state")
    async with following(tmp_path, kept, settings(tmp_path, **other)) as follower:
        await until(lambda: f"{tmp_path}/cluster-state cannot be used" in caplog.text)
        assert why in caplog.text
        assert not follower.synced

        await kept.start()
        await until(lambda: follower.synced)
        assert follower.endpoints("old") == ["10.244.1.3"]


async def test_a_write_that_failed_is_repeated_without_another_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attempts = []

    def write(file: Path, content: bytes) -> None:
        attempts.append(file)
        if len(attempts) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace_file(file, content)

    monkeypatch.setattr(cached, "replace_file", write)
    monkeypatch.setattr(cached, "_WRITE_EVERY_S", 0.05)
    async with api_server() as server:
        await serve(server, "web", ("10.244.0.2", "node-1"))
        async with following(tmp_path, server, settings(tmp_path)):
            await until((tmp_path / "cluster-state").exists)

    assert "cannot be written: No space left on device" in caplog.text
