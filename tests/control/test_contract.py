"""The contract lists every field of the API, and each statement in it is true."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
from kubernetes_asyncio.client import models

from tests.control.given import World, endpoints, pod, service
from tests.net.contract.table import every_probe
from tools.contract import page
from userspace_proxy import api
from userspace_proxy.control.contract import Clause, contract, left_alone
from userspace_proxy.control.fields import field_errors
from userspace_proxy.model.state import ProxyState
from userspace_proxy.model.topology import Node

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "reference" / "contract.md"
# The kinds that are listed whole; of Pods and Nodes a proxy reads little, and the rest changes with every release.
MODELS: dict[str, Any] = {
    "Service": models.V1Service,
    "EndpointSlice": models.V1EndpointSlice,
    "Endpoints": models.V1Endpoints,
}
OPAQUE = (models.V1ObjectReference, models.V1Condition, models.V1PortStatus)
CLAUSES = [(kind, clause) for kind, terms in contract().items() for clause in terms.clauses.values()]


# ---- what the API has, and what we read of it


def fields_of(model: Any, path: str = "") -> Iterator[str]:
    """Yield the fields of *model*, one of the API's types, as in ``spec.ports[].port``; opaque ones as a whole."""
    for name, kind in model.openapi_types.items():
        here = f"{path}.{model.attribute_map[name]}".lstrip(".")
        inner: Any = getattr(models, kind.removeprefix("list[").removesuffix("]"), None)
        if kind == "V1ObjectMeta":
            maps = ("labels", "annotations")
            yield from (f"{here}.{field}" + ".any" * (field in maps) for field in inner.attribute_map.values())
        elif inner is None or inner in OPAQUE:
            yield here
        else:
            yield from fields_of(inner, f"{here}[]" if kind.startswith("list[") else here)


def fields_read(kind: msgspec.inspect.Type, path: str = "") -> Iterator[str]:
    """Yield the fields that a struct of api/objects.py has."""
    match kind:
        case msgspec.inspect.StructType(fields=fields):
            for field in fields:
                yield from fields_read(field.type, f"{path}.{field.encode_name}".lstrip("."))
        case msgspec.inspect.UnionType(types=kinds):
            for each in kinds:
                if not isinstance(each, msgspec.inspect.NoneType):
                    yield from fields_read(each, path)
                    break
        case msgspec.inspect.ListType(item_type=msgspec.inspect.StructType() as item):
            yield from fields_read(item, f"{path}[]")
        case msgspec.inspect.DictType() if path.startswith("metadata."):
            yield f"{path}.any"
        case _:
            yield path


READ = {kind: set(fields_read(msgspec.inspect.type_info(struct))) for kind, struct in api.KINDS.items()}


def with_field(plain: Mapping[str, Any], path: str, value: object) -> dict[str, Any]:
    """Return *plain* with *value* at *path*, in each item of the lists on the way, of which there is one at least."""
    given = copy.deepcopy(dict(plain))
    at: list[dict[str, Any]] = [given]
    *parents, last = [str(step) for step in api.steps(path.replace("[]", ""))]
    way = ""
    for step in parents:
        way = api.below(way, step)
        is_list = f"{way}[]" in re.sub(r'\["[^"]*"\]$', "", path)
        way += "[]" if is_list else ""
        below: list[Any] = [item.setdefault(step, [{}] if is_list else {}) for item in at]
        at = [inner for item in below for inner in item] if is_list else below
    for item in at:
        item[last] = value
    return given


def clause_of(kind: str, path: str) -> Clause:
    ((_, clause),) = contract()[kind].of(with_field({}, path, "x"))
    return clause


# ---- the table is whole


@pytest.mark.parametrize(
    ("kind", "path"), [(kind, path) for kind, model in MODELS.items() for path in fields_of(model)]
)
def test_every_field_that_the_api_has_is_listed_and_known_to_check(kind: str, path: str) -> None:
    assert clause_of(kind, path).treatment != "unknown"
    assert [error.field for error in field_errors(kind, with_field({"metadata": {}}, path, "x"))] in (
        [],
        ["apiVersion"],
    )


@pytest.mark.parametrize(("kind", "path"), [(kind, path) for kind, read in READ.items() for path in sorted(read)])
def test_every_field_that_is_read_is_honoured_or_approximated(kind: str, path: str) -> None:
    # One type is that of the metadata of all kinds, and one that of both sorts of containers.
    is_shared = path.startswith("metadata.") or path == "spec.containers[].restartPolicy"

    assert is_shared or clause_of(kind, path).treatment in ("honoured", "approximated")


def test_fields_of_services_and_slices_are_named_one_by_one() -> None:
    for kind, model in MODELS.items():
        listed = {clause.field.partition(": ")[0] for each, clause in CLAUSES if each == kind}
        listed = {field for field in listed if not field.startswith("metadata.")}
        assert listed == {path for path in fields_of(model) if not path.startswith("metadata.")}


# ---- what it says is so


@pytest.mark.parametrize(
    ("kind", "clause"), CLAUSES, ids=lambda given: given if isinstance(given, str) else given.field
)
def test_fields_that_matter_are_read(kind: str, clause: Clause) -> None:
    if clause.treatment == "ignored" or clause.field in ("apiVersion", "kind"):  # these say which type is read
        return
    field = re.sub(r"^(metadata\.(?:labels|annotations)).*", r"\1.any", clause.field)
    assert any(path == field or path.startswith(field.removesuffix("*")) for path in READ[kind])


METADATA = {"name": "web", "namespace": "default", "labels": {}, "annotations": {}}
OBJECTS: dict[str, dict[str, Any]] = {
    "Service": {
        "metadata": METADATA,
        "spec": {
            "type": "LoadBalancer",
            "clusterIP": "10.96.0.10",
            "externalIPs": ["198.51.100.1"],
            "externalTrafficPolicy": "Local",
            "sessionAffinity": "ClientIP",
            "ports": [{"port": 80}],
        },
        "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}]}},
    },
    "EndpointSlice": {
        "metadata": {**METADATA, "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": ["10.244.0.2"], "nodeName": "here", "hints": {"forZones": [{"name": "a"}]}}],
        "ports": [{"port": 8080}],
    },
    "Node": {
        "metadata": {**METADATA, "name": "here", "labels": {"topology.kubernetes.io/zone": "a"}},
        "spec": {"podCIDR": "10.244.0.0/24", "taints": [{"key": "some"}]},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
    },
    "Endpoints": {
        "metadata": METADATA,
        "subsets": [
            {
                "addresses": [{"ip": "10.244.0.2"}],
                "notReadyAddresses": [{"ip": "10.244.0.3"}],
                "ports": [{"port": 8080}],
            }
        ],
    },
    "Pod": {
        "metadata": METADATA,
        "spec": {
            "containers": [{"ports": [{"containerPort": 8080}]}],
            "initContainers": [{"restartPolicy": "Always", "ports": [{"containerPort": 9090, "name": "more"}]}],
        },
        "status": {"podIP": "10.244.0.2", "conditions": [{"type": "Ready", "status": "True"}]},
    },
}


def served(kind: str, plain: Mapping[str, Any]) -> ProxyState:
    world = World(here=Node("here", "other"))
    beside = [service(clusterIP="10.96.0.10", sessionAffinity="ClientIP")] if kind != "Service" else []
    made = api.convert(kind, plain)
    if kind == "Pod":
        made = api.convert(kind, with_field(plain, "metadata.labels.app", "web"))
        beside = [service(clusterIP="10.96.0.10", selector={"app": "web"})]
    return world.tell(*beside, made)


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (kind, clause.field)
        for kind, clause in CLAUSES
        if clause.shown_by == ("tests/control/test_contract.py::test_what_is_ignored_changes_nothing",)
    ],
)
def test_what_is_ignored_changes_nothing(kind: str, field: str) -> None:
    plain = OBJECTS[kind]
    named = re.sub(r"^metadata\.\*$", "metadata.uid", field).replace("*", "anything")
    before = served(kind, plain)

    after = served(kind, with_field(plain, named, "anything"))

    assert after == before
    assert kind == "Node" or any(after.endpoints.values()) or after.service_ports


def test_endpoints_and_pods_say_on_which_node_they_are() -> None:
    world = World()
    addresses = {"addresses": [{"ip": "10.0.0.1", "nodeName": "a"}]}
    unready = {"notReadyAddresses": [{"ip": "10.0.0.2", "nodeName": "b"}]}

    world.tell(service(), endpoints({**addresses, **unready, "ports": [{"port": 80}]}))
    assert [endpoint.node_name for endpoint in world.endpoints()] == ["a", "b"]

    world.tell(service(selector={"app": "web"}), pod())
    assert [endpoint.node_name for endpoint in world.endpoints()] == ["node1"]


# ---- the tests that show it, and the page


@cache
def functions_in(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


NAMED = {test for _, clause in CLAUSES for test in clause.shown_by}
NAMED_OF_OTHERS = {test for clause in left_alone().values() for test in clause.shown_by}
NAMED_ON_THE_PAGE = {f"tests/{test}" for test in re.findall(r"`([\w/]+\.py(?:::| -k )[\w-]+)`", PAGE.read_text())}


@pytest.mark.parametrize("test", sorted(NAMED | NAMED_OF_OTHERS | NAMED_ON_THE_PAGE))
def test_every_test_that_is_named_exists(test: str) -> None:
    file, _, name = test.partition("::")
    if name:
        assert name in functions_in(TESTS.parent / file)
    else:
        file, _, word = test.partition(" -k ")
        assert file == "tests/net/contract/test_table.py"
        assert any(word in str(probe) for probe in every_probe())


def test_each_treatment_is_one_of_three_and_is_explained() -> None:
    for _, clause in CLAUSES:
        assert clause.treatment in ("honoured", "approximated", "ignored")
        assert clause.how.endswith(".")
        assert "|" not in clause.how
        assert clause.shown_by


def test_the_page_has_the_tables_of_the_contract() -> None:
    """`make reference` writes them."""
    text = PAGE.read_text()

    assert re.findall(r"<!-- fields of (\w+) -->", text) == list(contract())
    assert page(text) == text
    assert NAMED <= NAMED_ON_THE_PAGE
