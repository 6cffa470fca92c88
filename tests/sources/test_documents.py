"""Parsing of YAML text: the objects in it, their lines, and the problems of the rest."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import pytest

from userspace_proxy import api
from userspace_proxy.api.events import EventType
from userspace_proxy.errors import Note
from userspace_proxy.model.names import NamespacedName
from userspace_proxy.sources.documents import Manifest, Problem, duplicates, parse, split
from userspace_proxy.sources.files import FileSource
from userspace_proxy.sources.lines import Document, Place
from userspace_proxy.sources.yaml_values import plain_value

SERVICE = "kind: Service\nmetadata:\n  name: web\nspec:\n  ports:\n  - port: 80\n"


def only_problem(text: str) -> Problem:
    manifests, problems = parse(Document("f", 1, text))
    assert not manifests
    (problem,) = problems
    return problem


def only_manifest(text: str) -> Manifest:
    (manifest,), problems = parse(Document("f", 1, text))
    assert not problems
    return manifest


# ---- documents


def test_documents_begin_at_their_separator_and_know_their_line() -> None:
    found = list(split("f", "a: 1\n---\nb: 2\n--- # c\nc: 3\n"))

    assert [(document.line, document.text) for document in found] == [
        (1, "a: 1\n"),
        (2, "---\nb: 2\n"),
        (4, "--- # c\nc: 3\n"),
    ]


@pytest.mark.parametrize("text", ["", "---\n", "# words\n---\n---\n# more\n", "%YAML 1.1\n---\n", "---\n...\n"])
def test_a_part_without_content_is_no_document(text: str) -> None:
    assert list(split("f", text)) == []


def test_a_separator_inside_of_a_line_or_a_longer_one_separates_nothing() -> None:
    (document,) = split("f", "a: --- b\nc: |\n  ---\n  d\ne: ----\n")

    assert document.text.count("---") == 3


# ---- lines


@pytest.mark.parametrize(
    ("field", "line"),
    [
        ("", 11),
        ("metadata.name", 13),
        ("spec.ports[0].port", 16),
        ("spec.ports[0].nodePort", 16),
        ("spec.ports[7]", 15),
        ("spec.clusterIP", 14),
        ("nothing", 11),
    ],
)
def test_a_field_is_found_at_its_line_or_at_that_of_its_nearest_parent(field: str, line: int) -> None:
    assert Place(Document("f", 11, SERVICE)).where(field) == f"f:{line}"


def test_a_label_with_dots_in_its_name_is_found() -> None:
    text = "metadata:\n  labels:\n    a: b\n    kubernetes.io/service-name: web\n"

    field = api.below("metadata.labels", "kubernetes.io/service-name")

    assert Place(Document("f", 1, text)).where(field) == "f:4"


def test_an_item_of_a_list_has_lines_of_its_own() -> None:
    text = "kind: List\nitems:\n- kind: Service\n  metadata: {name: a}\n- kind: Service\n  metadata:\n    name: b\n"
    manifests, _ = parse(Document("f", 1, text))

    assert [manifest.place.where("metadata.name") for manifest in manifests] == ["f:4", "f:7"]


# ---- objects


def test_an_object_without_a_namespace_is_in_the_default_one_and_a_node_in_none() -> None:
    assert only_manifest(SERVICE).name == NamespacedName("default", "web")
    assert only_manifest("kind: Node\nmetadata: {name: n, namespace: x}\n").name == NamespacedName("", "n")


def test_the_items_of_a_typed_list_need_no_kind() -> None:
    manifests, problems = parse(Document("f", 1, "kind: ServiceList\nitems:\n- metadata: {name: a}\n"))

    assert not problems
    assert [(manifest.kind, manifest.name.name) for manifest in manifests] == [("Service", "a")]


@pytest.mark.parametrize("for_check", [True, False])
@pytest.mark.parametrize("inner", ["kind: List", "{kind: ServiceList, items: [{metadata: {name: b}}]}"])
def test_a_list_inside_of_a_list_is_refused_and_harms_no_item_beside_it(inner: str, for_check: bool) -> None:
    text = f"kind: List\nitems:\n- {inner}\n- kind: Pod\n  metadata: {{name: a}}\n"
    manifests, (problem,) = parse(Document("f", 1, text), for_check=for_check)

    assert [manifest.name.name for manifest in manifests] == ["a"]
    assert str(problem) == "f:3: kind: a List inside of a List is not read; write its items into the outer one"


LAUGHS = "\n".join(f"l{n}: &l{n} {{kind: List, items: [{', '.join([f'*l{n - 1}'] * 10)}]}}" for n in range(1, 10))
MERGES = "m0: &m0 {a: b}\n" + "".join(f"m{n}: &m{n}\n  <<: [*m{n - 1}, *m{n - 1}]\n" for n in range(1, 60))
SERVICES = "".join(f"- {{kind: Service, metadata: {{name: s{n}}}, spec: {{ports: *p}}}}\n" for n in range(300))
PORTS = f"x: &x {{port: 80}}\np: &p [{', '.join(['*x'] * 3000)}]\nkind: List\nitems:\n{SERVICES}"


@pytest.mark.parametrize("for_check", [True, False])
@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("&l\napiVersion: v1\nkind: List\nitems: [*l]\n", 4, "contains itself"),
        (SERVICE + "  labels: &m {a: *m}\n", 7, "contains itself"),
        (f"l0: &l0 {{kind: Pod, metadata: {{name: a}}}}\n{LAUGHS}\nkind: List\nitems: [*l9]\n", 4, "far larger"),
        (MERGES, 21, "far larger"),
        (PORTS, 23, "far larger"),
        ("- " * 30_000, 1, "nested more than 100 deep"),
        ("- ? " * 15_000, 1, "a key is no text"),
        ("a:\n- " + "- " * 500 + "b", 2, "nested more than 100 deep"),
        ("".join(" " * n + "a:\n" for n in range(500)), 101, "nested more than 100 deep"),
        ("".join(" " * n + f"a:\n{' ' * n}-\n" for n in range(200)), 101, "nested more than 100 deep"),
        ('{"a":' * 5_000 + "1" + "}" * 5_000, 1, "nested more than 100 deep"),
        ("kind: X\na: " + "!!seq [" * 5_000, 2, "nested more than 100 deep"),
        ("%TAG !a! b\n" * 200 + "a: 1\n", 1, "lines that begin with '%'"),
    ],
)
def test_a_document_over_a_bound_is_one_problem_at_its_place(
    text: str, line: int, reason: str, for_check: bool
) -> None:
    manifests, problems = parse(Document("f", 1, text), for_check=for_check)

    assert not manifests
    assert [(problem.where, reason in problem.error.reason) for problem in problems] == [(f"f:{line}", True)]


def test_aliases_and_merge_keys_within_the_bound_say_what_they_stand_for() -> None:
    plain, _ = plain_value(
        "a: &a {x: 1, y: 2}\nb: &b {y: 3, z: 4}\nc: {<<: [*a, *b], x: 5}\nd: {x: 6, <<: *a}\n"
        "e: {<<: *a, <<: *b}\nf: {<<: {<<: *a, q: 7}}\n'<<': g\nh: [*a, *a]\n"
    )

    assert isinstance(plain, dict)
    assert plain["c"] == {"x": 5, "y": 2, "z": 4}
    assert plain["d"] == {"x": 6, "y": 2}
    assert plain["e"] == {"x": 1, "y": 3, "z": 4}
    assert plain["f"] == {"x": 1, "y": 2, "q": 7}
    assert plain["<<"] == "g"
    assert plain["h"] == [plain["a"], plain["a"]]


def test_a_list_of_thousands_of_services_that_share_by_merge_keys_is_within_the_bound() -> None:
    base = "apiVersion: v1\nkind: Service\nspec:\n  selector: {app: web}\n  ports:\n  - {name: http, port: 80}\n"
    items = "".join(f"- <<: *base\n  metadata: {{name: s{n}}}\n" for n in range(3_000))
    manifests, problems = parse(
        Document("f", 1, f"x: &base\n  {base.replace(chr(10), chr(10) + '  ')}\nkind: List\nitems:\n{items}")
    )

    assert not problems
    assert len(manifests) == 3_000


@pytest.mark.parametrize(
    "tagged",
    [
        *("!!bool x", "!!bool ''", "!!int x", "!!int '-'", "!!int 0b", "!!float _", "!!float ''", "!!null [a]"),
        *("!!timestamp x", "!!timestamp 2024-13-45", "!!binary é", "!!merge x", "!!set {a}", "!!omap [a: 1]"),
        *("!!pairs [a: 1]", "!!str [a]", "!!map [a]", "!!seq {a: b}", "!!value =", "!!python/name:os.system x"),
        *("9" * 5_000, "0x" + "f" * 5_000),
    ],
)
def test_a_value_that_is_not_what_its_tag_says_is_a_mistake_in_its_line_and_no_bug(tagged: str) -> None:
    problem = only_problem(f"kind: Service\nmetadata: {{name: a}}\nspec:\n  externalName: {tagged}\n")

    assert problem.where == "f:4"
    assert problem.error.field == "spec.externalName" or problem.error.field == "externalName"
    assert "bug" not in problem.error.reason
    assert len(str(problem)) < 300


def test_of_a_list_without_any_object_the_first_hundred_items_are_named() -> None:
    _, problems = parse(Document("f", 1, "kind: List\nitems: [" + "1, " * 5_000 + "]\n"))

    assert len(problems) == 101
    assert "more than 100 objects" in str(problems[-1])


def test_a_long_or_unprintable_name_is_shown_shortened_in_one_line() -> None:
    problem = only_problem(
        'kind: Service\nmetadata: {name: a}\nspec: {type: [{"\\e[31m\\n\\u202e' + "x" * 5_000 + '": 1}]}\n'
    )

    assert len(str(problem)) < 2_000
    assert str(problem).isprintable()


def test_an_unexpected_exception_for_a_document_is_logged_and_stops_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    document = Document("f", 7, None)  # type: ignore[arg-type]  # stands for a bug of ours
    manifests, (problem,) = parse(document)

    assert not manifests
    assert problem.where == "f:7"
    assert problem.error.reason.startswith("a bug: TypeError")
    assert "Traceback" in caplog.text


def test_one_bad_item_of_a_list_harms_no_other() -> None:
    text = "kind: List\nitems:\n- kind: Service\n- 7\n- kind: Service\n  metadata: {name: c}\n"
    manifests, problems = parse(Document("f", 1, text))

    assert [manifest.name.name for manifest in manifests] == ["c"]
    assert [problem.where for problem in problems] == ["f:3", "f:4"]


def test_a_kind_that_ends_in_list_but_has_no_items_is_an_object() -> None:
    assert only_manifest("kind: IPAllowList\nmetadata: {name: x}\nitems: {a: b}\n").object is None


def test_a_service_of_another_api_group_is_skipped() -> None:
    assert only_manifest("apiVersion: serving.knative.dev/v1\n" + SERVICE).object is None
    assert only_manifest("apiVersion: v1\n" + SERVICE).object is not None


@pytest.mark.parametrize("date", ["2024-01-31", "2024-01-31T10:00:00Z", "2024-13-45"])
def test_a_date_is_text_as_it_is_for_kubernetes(date: str) -> None:
    manifest = only_manifest(f"kind: Service\nmetadata: {{name: web, labels: {{built: {date}}}}}\n")

    assert manifest.object is not None
    assert manifest.object.metadata.labels == {"built": date}


def test_an_alias_stands_for_what_it_names() -> None:
    manifest = only_manifest("kind: Service\nmetadata: {name: web, labels: &l {a: b}}\nspec: {selector: *l}\n")

    assert isinstance(manifest.object, api.Service)
    assert manifest.object.spec is not None
    assert manifest.object.spec.selector == {"a": "b"}


# ---- what is said of texts that hold none


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("<!DOCTYPE html>\n<html lang=en>\n<p>a: b</p>\n", 3, "this is HTML"),
        ("<html>\n", 1, "this is HTML"),
        ("--- \n<html><p>a</p></html>\n", 2, "this is HTML"),
        (SERVICE + "<div class='code'>x: y: z</div>\n", 7, "this is HTML"),
        ("kind: Service\nmetadata:\n\tname: web\n", 3, "a tab is used"),
        ('{\n\t"kind": "Service"\n\t"spec": {}\n}\n', 3, "write ',' between what is in them"),
        ("kind: Service\nmetadata:\n  name: {{ .Release.Name }}\n", 3, "this is a template"),
        ("kind: Service\nspec:\n  a: b\n c: d\n", 4, "the YAML is broken near 'c: d'"),
        ("kind: Service\nspec: [a\n", 2, "the YAML is broken"),
        ("a: b\nc: 'd\ne: f\ng: h\n", 2, "c: the quote is never closed"),
        ('a: b\nc: "d\ne: f\ng: "h"\n', 2, "c: the quote is never closed"),
        ("kind: Service\nmetadata:\n  name:web\n", 2, "a space is missing after ':'; write 'name: web'"),
        ("metadata:\n  name:web\n  labels:\n    a: b\n", 2, "a space is missing after ':'; write 'name: web'"),
        ("kind: Service\nmetadata: {name:web}\n", 2, "a space is missing after ':'; write 'name: web'"),
        ("kind: Pod\nmetadata: {name: a, labels: {b:c}}\n", 2, "a space is missing after ':'; write 'b: c'"),
        ("kind:Service\nmetadata: {name: web}\n", 1, "a space is missing after ':'; write 'kind: Service'"),
        ("a:\n- port:80\n  targetPort: 8080\n", 2, "a space is missing after ':'; write 'port: 80'"),
        ("a:\n  - port: 80\n  -port: 81\n", 3, "a space is missing after '-'; write '- port:'"),
        ("a:\n  -port: 81\n   name: b\n", 2, "a space is missing after '-'; write '- port:'"),
        ("a:\n  port: *\n", 2, "write a number"),
        ("a:\n  host: *.example.org\n", 2, "put the value in quotes"),
        ("a:\n  image: @nginx\n", 2, "no value begins with '@'; put the value in quotes"),
        ("a:\n  image: &\n", 2, "'&' begins an anchor, which needs a name; put the value in quotes"),
        ("kind: Service\nx: *nothing\n", 2, "undefined alias"),
        ("kind: Service\nx: \x01\n", 2, "the YAML is broken"),
        ("just words\n", 1, "this is no Kubernetes object"),
        ("- kind: Service\n", 1, "this is no Kubernetes object"),
        ("metadata: {name: web}\n", 1, "the object has no kind"),
        ("kind: Service\nspec: {}\n", 1, "metadata: the object has no name; add metadata.name"),
        ("kind: Service\nmetadata:\n  name:\n", 2, "metadata: the object has no name; add metadata.name"),
        ("kind: Service\nmetadata:\n  name: 8080\n", 3, "8080 is no text; put the name in quotes"),
        ("kind: Service\nspec: [a\n", 2, "close each '['"),
        ("kind: Service\nmetadata: web\n", 2, "the object has no name"),
        ("kind: Service\nmetadata: {name: web}\nspec:\n  ports:\n    port: 80\n", 4, "must be a list, not a mapping"),
    ],
)
def test_a_text_that_is_no_manifest_is_told_apart_with_its_line(text: str, line: int, said: str) -> None:
    problem = only_problem(text)

    assert said in str(problem)
    assert problem.where == f"f:{line}"
    assert problem.error.fix


@pytest.mark.parametrize("text", ["[" * 2_000 + "]" * 2_000, "{kind: " * 2_000 + "}" * 2_000])
def test_deep_nesting_is_a_problem_and_no_crash(text: str) -> None:
    assert only_problem(text).where == "f:1"


def test_the_key_of_a_label_that_is_no_text_is_named() -> None:
    problem = only_problem("kind: Pod\nmetadata:\n  name: web\n  labels:\n    a: b\n    example.org/on: yes\n")

    assert problem.where == "f:6"
    assert problem.error.field == 'metadata.labels["example.org/on"]'
    assert problem.error.fix == "put the value in quotes"


def test_a_key_that_is_a_number_or_a_truth_value_is_text_as_in_json() -> None:
    (manifest,), problems = parse(Document("f", 1, "kind: Pod\nmetadata:\n  name: web\n  labels: {80: a, on: b}\n"))

    assert not problems
    assert manifest.object is not None
    assert manifest.object.metadata.labels == {"80": "a", "true": "b"}


def test_the_value_of_an_annotation_may_be_a_number_a_truth_value_or_null() -> None:
    text = "kind: Pod\nmetadata:\n  name: web\n  annotations: {a: 1, b: yes, c: null, d: 1.5, e: text}\n"
    (manifest,), problems = parse(Document("f", 1, text))

    assert not problems
    assert manifest.object is not None
    assert manifest.object.metadata.annotations == {"a": "1", "b": "true", "c": "", "d": "1.5", "e": "text"}


@pytest.mark.parametrize("value", ["!vault |\n    abc", "!Ref [a, {b: c}]", "!reference {a: b}"])
def test_another_tools_tag_hides_no_object(value: str) -> None:
    manifests, problems = parse(Document("f", 1, f"kind: Secret\nmetadata: {{name: s}}\nstringData:\n  p: {value}\n"))

    assert [manifest.kind for manifest in manifests] == ["Secret"]
    assert not problems


# ---- for checks


def test_for_a_check_the_values_of_a_wrong_type_are_all_named_and_the_rest_is_kept() -> None:
    text = """kind: Service
metadata: {name: web, labels: {a: 1, b: 2}}
spec:
  selector: {app: yes}
  ports:
  - port: "80"
    targetPort: 1.5
"""
    (manifest,), problems = parse(Document("f", 1, text), for_check=True)

    assert not problems
    assert {error.field for error in manifest.errors} == {
        "metadata.labels.a",
        "metadata.labels.b",
        "spec.selector.app",
        "spec.ports[0].port",
        "spec.ports[0].targetPort",
    }
    assert isinstance(manifest.object, api.Service)
    assert manifest.object.spec is not None
    assert manifest.object.spec.ports == [api.ServicePort(80)]
    assert manifest.plain is not None
    assert manifest.plain["metadata"]["labels"]["a"] == 1


def test_for_a_check_an_object_that_lacks_too_much_is_named_all_the_same() -> None:
    text = "kind: Service\nmetadata: {name: web}\nspec: {ports: [{port: http}]}\n"
    (manifest,), _ = parse(Document("f", 1, text), for_check=True)

    assert manifest.object is None
    assert [str(error) for error in manifest.errors] == [
        "spec.ports[0].port: must be a number, not text; write it in digits, without quotes"
    ]


def test_for_a_check_a_key_that_stands_twice_is_named_at_its_second_line() -> None:
    text = SERVICE + "    port: 81\nmetadata:\n  name: other\n"
    _, problems = parse(Document("f", 1, text), for_check=True)

    assert sorted((problem.where, problem.error.field) for problem in problems) == [
        ("f:7", "spec.ports[0].port"),
        ("f:8", "metadata"),
    ]


@pytest.mark.parametrize("for_check", [True, False])
def test_merge_keys_and_aliases_are_no_keys_that_stand_twice(for_check: bool) -> None:
    text = "kind: X\nmetadata: &m {name: a, b: c}\nx:\n  <<: *m\n  <<: *m\n  b: d\ny: &y [*m, *m]\n"
    _, problems = parse(Document("f", 1, text), for_check=for_check)

    assert not problems


def test_a_key_that_stands_twice_beside_a_merge_key_is_named() -> None:
    text = "kind: X\nmetadata: &m {name: a, b: c}\nx:\n  <<: *m\n  d: e\n  d: f\n"
    _, (problem,) = parse(Document("f", 1, text))

    assert (problem.where, problem.error.field) == ("f:6", "x.d")


def test_an_anchor_that_stands_twice_hides_no_key_that_does_and_costs_no_line() -> None:
    """YAML 1.2 allows it; from there on, the name stands for the new value."""
    text = "kind: Service\nmetadata: {name: web}\nx: &a 1\ny: &a {b: c}\nz: *a\nd: e\nd: f\n"
    (manifest,), (problem,) = parse(Document("f", 1, text))

    assert (problem.where, problem.error.field) == ("f:7", "d")
    assert [manifest.place.where(field) for field in ("x", "y.b", "z.b", "d")] == ["f:3", "f:4", "f:4", "f:6"]


# ---- what `run` says of keys that stand twice


def test_keys_that_stand_twice_are_a_problem_that_hides_nothing() -> None:
    (manifest,), (problem,) = parse(Document("f", 1, SERVICE + "    port: 81\n"))

    assert isinstance(manifest.object, api.Service)
    assert manifest.object.spec == api.objects.ServiceSpec(ports=[api.ServicePort(81)])
    assert str(problem) == (
        "f:7: spec.ports[0].port: 'port' stands twice, 1 line apart, and only this one counts; remove one of them"
    )
    assert not problem.hides


def test_an_object_that_begins_without_a_separator_is_one_problem_that_may_hide_the_one_before() -> None:
    (manifest,), (problem,) = parse(Document("f", 1, "apiVersion: v1\n" + SERVICE * 2))

    assert manifest.name == NamespacedName("default", "web")
    assert str(problem) == "f:8: a new object begins here; put '---' on a line before it"
    assert problem.hides


def test_for_a_check_objects_without_a_separator_are_all_read_each_at_its_lines() -> None:
    texts = [SERVICE.replace("web", name) for name in ("a", "b", "c")]
    manifests, problems = parse(Document("f", 5, "".join(texts), start=70), for_check=True)

    assert [manifest.place.where("metadata.name") for manifest in manifests] == ["f:7", "f:13", "f:19"]
    assert [manifest.place.document.start for manifest in manifests] == [70, 70 + len(texts[0]), 70 + 2 * len(texts[0])]
    assert [problem.where for problem in problems] == ["f:11", "f:17"]


@pytest.mark.parametrize(
    "text",
    ["kind: Pod\nkind: Service\nmetadata: {name: web}\n", '{"kind": "A", "metadata": {"name": "a"}, "kind": "B"}'],
)
def test_a_kind_that_stands_twice_in_one_object_is_no_new_one(text: str) -> None:
    _, (problem,) = parse(Document("f", 1, text), for_check=True)

    assert problem.error.reason.startswith("'kind' stands twice")


async def next_events(source: FileSource, *texts: str, file: Path) -> list[list[tuple[EventType, str]]]:
    """Return the events of *source* after each of *texts* is written to *file*, without SYNCED."""
    told = []
    written = iter(texts)
    file.write_text(next(written))
    events = source.events()
    try:
        async with asyncio.timeout(10):
            async for batch in events:
                if named := [(event.type, event.name.name) for event in batch if event.name]:
                    told.append(named)
                    if (text := next(written, None)) is None:
                        break
                    file.write_text(text)
    finally:
        await events.aclose()
    return told


async def test_a_key_that_stands_twice_keeps_no_deleted_object_alive(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "a.yaml"
    file.touch()
    source = FileSource([str(file)])
    other = SERVICE.replace("web", "other")

    told = await next_events(source, SERVICE + "---\n" + other, SERVICE + "    port: 81\n", file=file)

    assert told[1] == [(EventType.SET, "web"), (EventType.DELETE, "other")]
    assert list(source.problems) == [f"{file}:7"]
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert said.endswith("only this one counts; remove one of them")


async def test_a_separator_that_gets_lost_takes_no_object_away(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.touch()
    source = FileSource([str(file)])
    other = SERVICE.replace("web", "other").replace("80", "81")

    told = await next_events(source, SERVICE + "---\n" + other, SERVICE + other.replace("81", "82"), file=file)

    assert told[1] == [(EventType.SET, "other")]
    assert list(source.problems.values()) == [f"{file}:7: a new object begins here; put '---' on a line before it"]


def test_a_copy_of_a_file_is_reported_in_few_words() -> None:
    text = "".join(f"---\nkind: Service\nmetadata: {{name: s{index}}}\n" for index in range(100))
    manifests = [m for path in ("a", "b") for document in split(path, text) for m in parse(document)[0]]

    found = duplicates(manifests)

    assert len(found) == 11
    assert str(found[0]) == "b:3: metadata.name: Service default/s0 is already at a:3; remove one of them"
    assert "90 more objects are already in a" in str(found[-1])


def test_of_files_that_may_be_alternatives_the_second_is_a_note_and_within_one_file_a_fault() -> None:
    text = "kind: Service\nmetadata: {name: a}\n"
    texts = {"x": text, "y": text + "---\n" + text}
    manifests = [m for path, text in texts.items() for document in split(path, text) for m in parse(document)[0]]

    (between,) = duplicates(manifests[:2], may_be_alternatives=True)
    (within,) = duplicates(manifests[1:], may_be_alternatives=True)

    assert isinstance(between.error, Note)
    assert (
        str(between)
        == "y:2: metadata.name: Service default/a is already at x:2; 'run' serves the first; remove one of them"
    )
    assert not isinstance(within.error, Note)


def test_the_items_of_a_list_of_one_kind_need_neither_kind_nor_version() -> None:
    text = "apiVersion: v1\nkind: ServiceList\nitems: [{metadata: {name: a}, spec: {ports: [{port: 80}]}}]\n"

    (found,), problems = parse(Document("f", 1, text), for_check=True)

    assert not problems
    assert found.plain is not None
    assert (found.kind, found.plain["apiVersion"]) == ("Service", "v1")


def test_brackets_nested_without_end_are_an_error_and_no_crash() -> None:
    _, problems = parse(Document("f", 1, "kind: " + "[" * 50_000))
    (object_with_brackets,), none = parse(Document("f", 1, 'kind: X\nmetadata: {name: a}\nnote: "' + "[" * 200 + '"\n'))

    assert "nested more than 100 deep" in str(problems[0])
    assert not none
    assert object_with_brackets.name.name == "a"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1", 1), ("0x1f", 31), ("1.5", 1.5), ("true", True), ("~", None)),
        *(("1e3", "1e3"), ("2024-01-01", "2024-01-01"), ("53:53", "53:53"), ("1:30.5", "1:30.5")),
    ],
)
def test_scalars_are_what_yaml_says_they_are(text: str, value: object) -> None:
    (manifest,), _ = parse(Document("f", 1, f"kind: X\nmetadata: {{name: a}}\nv: {text}\n"), for_check=True)

    assert manifest.plain is not None
    assert manifest.plain["v"] == value


def test_an_escape_of_two_halves_in_json_is_one_character() -> None:
    notes = {"two": "\U0001f680\U0001f600", "literal": "\\ud83d\\ude00", "after a backslash": "\\\U0001f680"}
    text = json.dumps({"kind": "Service", "metadata": {"annotations": notes, "name": "web"}}, indent=1)

    manifest = only_manifest(text)

    assert manifest.object is not None
    assert manifest.object.metadata.annotations == notes
    assert manifest.place.where("metadata.name") == "f:9"
    assert plain_value("note: \\ud83d\\ude00\n") == ({"note": "\\ud83d\\ude00"}, False), "no JSON"


def test_a_name_in_the_first_column_is_said_to_belong_under_metadata() -> None:
    problem = only_problem("kind: Service\nmetadata:\nname: a\nspec:\n  ports: [{port: 80}]\n")

    assert problem.where == "f:3"
    assert "belongs under 'metadata'" in problem.error.reason
