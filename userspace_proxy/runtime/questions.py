"""The questions that the control socket answers, by path."""

from __future__ import annotations

from collections.abc import Mapping

from userspace_proxy.admin.control_socket import Question
from userspace_proxy.control.controller import Controller
from userspace_proxy.control.pod_names import environment, hosts_lines, known_services
from userspace_proxy.control.tracker import Tracker
from userspace_proxy.model.names import NamespacedName
from userspace_proxy.runtime.inspection import Inspection
from userspace_proxy.runtime.why import Explainer

_DEFAULT_NAMESPACE = "default"


def questions(
    inspection: Inspection, explainer: Explainer, controller: Controller, tracker: Tracker
) -> Mapping[str, Question]:
    """Return the questions of `get`, `describe`, `why`, `env` and `names`: path -> function of the parameters."""

    async def services(given: Mapping[str, str]) -> object:
        return inspection.services(given.get("namespace", ""), given.get("name", ""))

    async def endpoints(given: Mapping[str, str]) -> object:
        return await inspection.endpoints(given.get("namespace", ""), given.get("name", ""))

    async def connections(given: Mapping[str, str]) -> object:
        items, hidden = await inspection.connections(given.get("namespace", ""), given.get("name", ""))
        return {"items": items, "hidden": hidden}

    async def description(given: Mapping[str, str]) -> object:
        name = _name(given)
        if (found := await inspection.describe(name)) is None:
            raise LookupError(f"there is no Service {name}")
        return found

    async def why(given: Mapping[str, str]) -> object:
        return await explainer.explain(_name(given), given.get("port", ""), given.get("client", ""), controller.synced)

    async def env(given: Mapping[str, str]) -> object:
        found = environment(known_services(tracker), given.get("namespace") or _DEFAULT_NAMESPACE)
        return [f"{name}={value}" for name, value in found.items()]

    async def names(given: Mapping[str, str]) -> object:
        domain = given.get("domain") or "cluster.local"
        return list(hosts_lines(known_services(tracker), given.get("namespace") or _DEFAULT_NAMESPACE, domain))

    return {
        "env": env,
        "names": names,
        "services": services,
        "endpoints": endpoints,
        "connections": connections,
        "description": description,
        "why": why,
    }


def _name(given: Mapping[str, str]) -> NamespacedName:
    if not given.get("name"):
        raise ValueError("give the Service's name")
    return NamespacedName(given.get("namespace") or _DEFAULT_NAMESPACE, given["name"])
