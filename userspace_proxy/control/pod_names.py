"""How processes find Services without cluster DNS: environment variables, and lines of /etc/hosts. Pure."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from userspace_proxy import api
from userspace_proxy.control.tracker import Tracker
from userspace_proxy.model.dns_names import ServiceNames
from userspace_proxy.model.endpoint import join_address
from userspace_proxy.model.names import NamespacedName

_LABEL = re.compile(r"[a-z0-9-]{1,63}")
# Every pod has its variables (pkg/kubelet, masterServices).
_MASTER_SERVICE = NamespacedName("default", "kubernetes")


@dataclass(frozen=True, slots=True)
class KnownService:
    """The ports of a Service as its object states them, and its addresses."""

    ports: Sequence[api.ServicePort]
    names: ServiceNames


def known_services(tracker: Tracker) -> Mapping[NamespacedName, KnownService]:
    """Return the Services of *tracker* that have a name."""
    return {
        name: KnownService((service.spec and service.spec.ports) or (), names)
        for name, service in tracker.services.items()
        if (names := tracker.names_of(name, service)) is not None
    }


def environment(services: Mapping[NamespacedName, KnownService], namespace: str) -> dict[str, str]:
    """Return the variables that the kubelet sets for a pod of *namespace* (pkg/kubelet/envvars).

    Those of Services with a cluster IP in the namespace, and of default/kubernetes. If two Services make the same
    variable, the last one by name wins.
    """
    found = {name.name: service for name, service in services.items() if name.namespace == namespace}
    if (master := services.get(_MASTER_SERVICE)) is not None:
        found.setdefault(_MASTER_SERVICE.name, master)
    return {
        variable: value
        for name, service in sorted(found.items(), key=lambda item: item[0])
        if service.names.cluster_ips and (ports := list(filter(_is_valid, service.ports)))
        for variable, value in _variables(name, service.names.cluster_ips[0], ports)
    }


def _is_valid(port: api.ServicePort) -> bool:
    """Return whether *port* can be part of a variable. Those of another proxy's Services are not checked elsewhere."""
    return port.protocol in (None, "TCP", "UDP", "SCTP") and (not port.name or bool(_LABEL.fullmatch(port.name)))


def _variables(name: str, ip: str, ports: Sequence[api.ServicePort]) -> Iterator[tuple[str, str]]:
    prefix = _variable(name)
    yield f"{prefix}_SERVICE_HOST", ip
    yield f"{prefix}_SERVICE_PORT", str(ports[0].port)
    for port in ports:
        if port.name:
            yield f"{prefix}_SERVICE_PORT_{_variable(port.name)}", str(port.port)
    # As for linked containers of Docker.
    for index, port in enumerate(ports):
        protocol = port.protocol or "TCP"
        url = f"{protocol.lower()}://{join_address(ip, port.port)}"
        if index == 0:
            yield f"{prefix}_PORT", url
        of_port = f"{prefix}_PORT_{port.port}_{protocol.upper()}"
        yield of_port, url
        yield f"{of_port}_PROTO", protocol.lower()
        yield f"{of_port}_PORT", str(port.port)
        yield f"{of_port}_ADDR", ip


def _variable(name: str) -> str:
    return name.upper().replace("-", "_")


def hosts_lines(services: Mapping[NamespacedName, KnownService], namespace: str, domain: str) -> Iterator[str]:
    """Yield lines of /etc/hosts for *services*; those of *namespace* have their short name, too."""
    for (own, name), service in sorted(services.items()):
        if service.names.external_name:
            yield f"# {name}.{own}.svc.{domain} is {service.names.external_name}"
        aliases = f"{name}.{own}.svc.{domain} {name}.{own}.svc {name}.{own}"
        aliases += f" {name}" if own == namespace else ""
        hosts = {host.ip: host.hostname for group in service.names.groups for host in group.hosts}
        for ip, hostname in (*dict.fromkeys(service.names.cluster_ips, "").items(), *hosts.items()):
            yield f"{ip} {aliases}" + (f" {hostname}.{name}.{own}.svc.{domain}" if hostname else "")
