"""The Services in manifests or a cluster, for commands that need no running proxy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.apiserver import SERVICES, SLICES, api_server
from tests.sources.test_kubernetes import kubeconfig
from userspace_proxy.config.settings import Settings
from userspace_proxy.control.memory import SavedAllocations, StateDir
from userspace_proxy.errors import StartError
from userspace_proxy.model.dns_names import DnsHost
from userspace_proxy.model.names import NamespacedName
from userspace_proxy.runtime.desired_state import known_services

WEB = NamespacedName("default", "web")
MANIFEST = "kind: Service\napiVersion: v1\nmetadata: {name: web}\nspec: {ports: [{port: 80}]}\n"


async def test_manifests_have_the_addresses_that_the_proxy_allocated(tmp_path: Path) -> None:
    StateDir(tmp_path / "state").save(SavedAllocations(cluster_ips={"default/web/IPv4": "10.96.7.7"}))
    (tmp_path / "web.yaml").write_text(MANIFEST)

    known = await known_services(Settings(paths=(str(tmp_path),), state_dir=tmp_path / "state"))

    assert known[WEB].names.cluster_ips == ("10.96.7.7",)


async def test_a_cluster_has_services_of_every_proxy_and_headless_ones(tmp_path: Path) -> None:
    labels = {"service.kubernetes.io/service-proxy-name": "other"}
    async with api_server() as server:
        web = {"metadata": {"name": "web", "namespace": "default", "labels": labels}}
        await server.put(SERVICES, {**web, "spec": {"clusterIP": "172.30.0.9", "ports": [{"port": 80}]}})
        db = {"name": "db", "namespace": "default"}
        await server.put(SERVICES, {"metadata": db, "spec": {"clusterIP": "None", "selector": {"app": "db"}}})
        await server.put(
            SLICES,
            {
                "metadata": {**db, "labels": {"kubernetes.io/service-name": "db"}},
                "addressType": "IPv4",
                "endpoints": [{"addresses": ["10.244.0.2"], "hostname": "db-0"}],
            },
        )

        known = await known_services(Settings(kubeconfig=kubeconfig(tmp_path, server.url)))

    assert known[WEB].names.cluster_ips == ("172.30.0.9",)
    assert [port.port for port in known[WEB].ports] == [80]
    hosts = known[NamespacedName("default", "db")].names.groups[0].hosts
    assert hosts == (DnsHost("db-0", "10.244.0.2"),)


async def test_the_login_of_several_kubeconfigs_is_used_as_by_kubectl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with api_server() as server:
        web = {"metadata": {"name": "web", "namespace": "default"}}
        await server.put(SERVICES, {**web, "spec": {"clusterIP": "172.30.0.9", "ports": [{"port": 80}]}})
        monkeypatch.setenv("KUBECONFIG", f"{tmp_path / 'none'}:{kubeconfig(tmp_path, server.url)}:")

        assert set(await known_services(Settings())) == {WEB}


async def test_without_manifests_and_without_a_login_there_is_nothing_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))

    with pytest.raises(StartError, match="give --kubeconfig FILE, or manifests"):
        await known_services(Settings())
