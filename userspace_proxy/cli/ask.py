"""`get`, `describe` and `why`: what a running proxy serves, and why, asked at its control socket."""

import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlencode

import click

from userspace_proxy.cli.options import fail, file_option
from userspace_proxy.printable import printable

_TIMEOUT_S = 30.0
_WATCH_EVERY_S = 1.0
# As in run; the constants of config and admin would cost their imports.
_DEFAULT_SOCKET = "/var/lib/userspace-proxy/control.sock"
_KINDS = {
    **dict.fromkeys(("services", "service", "svc"), "services"),
    **dict.fromkeys(("endpoints", "endpoint", "ep"), "endpoints"),
    **dict.fromkeys(("connections", "connection", "conn"), "connections"),
}

Row = dict[str, Any]


class _Connection(HTTPConnection):
    """HTTP over the Unix socket at *path*."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_TIMEOUT_S)
        folder = os.open(self._path.parent, os.O_PATH | os.O_DIRECTORY)
        try:  # by the folder, as a path may be too long for an address
            self.sock.connect(f"/proc/self/fd/{folder}/{self._path.name}")
        finally:
            os.close(folder)


def ask(path: Path, question: str, **parameters: str) -> Row:
    """Return the answer to *question*; ends this process with a message that names the fix if there is none."""
    connection = _Connection(path)
    try:
        connection.request("GET", f"/v1/{question}?{urlencode(parameters)}")
        response = connection.getresponse()
        answer: Row = json.loads(response.read())
    except PermissionError:
        fail(f"{path} is for the user that runs the proxy; use sudo")
    except OSError as error:
        reason = error.strerror or error
        fail(f"no proxy answers at {path} ({reason}); start one with `run`, or name its socket with --control-socket")
    except (HTTPException, ValueError) as error:
        fail(f"what answers at {path} is no proxy of this version: {error}")
    if "error" in answer:
        fail(answer["error"])
    return answer


SOCKET = file_option(
    "--control-socket",
    envvar="USERSPACE_PROXY_CONTROL_SOCKET",
    default=_DEFAULT_SOCKET,
    help=f"Control socket of the proxy (default {_DEFAULT_SOCKET})",
)
NAMESPACE = click.option("-n", "--namespace", metavar="NS", default="default", help="Namespace (default default)")
_OUTPUT = click.option("-o", "--output", type=click.Choice(["wide", "json", "yaml"]), help="Columns, or a format")


@click.command()
@click.argument("kind", type=click.Choice(sorted(_KINDS)), metavar="services|endpoints|connections")
@click.argument("name", default="")
@NAMESPACE
@click.option("-A", "--all-namespaces", is_flag=True, help="All namespaces")
@_OUTPUT
@click.option("-w", "--watch", is_flag=True, help="Print rows again when they change, until Ctrl-C")
@SOCKET
def get(
    kind: str,
    name: str,
    *,
    namespace: str,
    all_namespaces: bool,
    output: str | None,
    watch: bool,
    control_socket: Path,
) -> None:
    """List what a running proxy serves: Services, endpoints or open connections."""
    _check_watch(output, watch=watch)
    kind = _KINDS[kind]
    whose = {"namespace": "" if all_namespaces else namespace, "name": name}
    which = {"wide": output == "wide", "everywhere": all_namespaces}
    answer = ask(control_socket, kind, **whose)
    if output in ("json", "yaml"):
        _dump(answer, output)
        return
    heads, *rows = _table(kind, answer["items"], **which)
    if name and not rows and kind == "services":
        fail(f"there is no Service {namespace}/{name}; -A lists those of all namespaces")
    if not rows and not watch:
        click.echo(f"No {kind} found{'' if all_namespaces else f' in namespace {namespace}'}.", err=True)
        return
    widths = _widths([heads, *rows])
    _print_rows([heads, *rows], widths)
    if answer.get("hidden"):
        click.echo(f"... and {answer['hidden']} more", err=True)
    while watch:
        time.sleep(_WATCH_EVERY_S)
        before = {_without_ages(row) for row in rows}
        _, *rows = _table(kind, ask(control_socket, kind, **whose)["items"], **which)
        _print_rows([row for row in rows if _without_ages(row) not in before], widths)


def _check_watch(output: str | None, *, watch: bool) -> None:
    if watch and output in ("json", "yaml"):
        raise click.UsageError(f"-w prints rows; leave out -w, or -o {output}")


def _joined(texts: Sequence[str]) -> str:
    return ", ".join(texts) or "<none>"


@click.command()
@click.argument("kind", type=click.Choice(["service", "services", "svc"]), metavar="service")
@click.argument("name")
@NAMESPACE
@click.option("-o", "--output", type=click.Choice(["json", "yaml"]), help="Format")
@SOCKET
def describe(kind: str, name: str, *, namespace: str, output: str | None, control_socket: Path) -> None:
    """Show all that a running proxy knows of a Service, with its endpoints and recent events."""
    answer = ask(control_socket, "description", namespace=namespace, name=name)
    if output:
        _dump(answer, output)
        return
    service = answer["service"]
    facts = {
        "Name": service["name"],
        "Namespace": service["namespace"],
        "Type": service["type"],
        "Selector": _labels(service["selector"]),
        "IPs": _joined(service["cluster_ips"]),
        "External IPs": _joined(service["external_ips"]),
        "Ports": _joined(service["ports"]),
        **answer["facts"],
        **({"Problem": service["problem"]} if service["problem"] else {}),
    }
    width = max(map(len, facts)) + 2
    for fact, value in facts.items():
        click.echo(printable(f"{fact + ':':<{width}}{value}"))
    for title, items in (("Endpoints", answer["endpoints"]), ("Events", answer["events"][-20:])):
        click.echo(f"{title}:{'' if items else ' <none>'}")
        if items:
            table = _table(title.lower(), items, wide=True)
            _print_rows(table, _widths(table), indent="  ")


@click.command()
@click.argument("name", metavar="NAME[:PORT]")
@click.option("--client", metavar="IP", default="", help="Address of the client")
@NAMESPACE
@click.option("-o", "--output", type=click.Choice(["json", "yaml"]), help="Format")
@SOCKET
def why(name: str, *, client: str, namespace: str, output: str | None, control_socket: Path) -> None:
    """Say which endpoint the next connection to a Service gets and why, or why it cannot be reached."""
    service, _, port = name.partition(":")
    answer = ask(control_socket, "why", namespace=namespace, name=service, port=port, client=client)
    if output:
        _dump(answer, output)
    else:
        for line in _explained(answer):
            click.echo(printable(line))
    if answer["obstacle"]:
        sys.exit(1)


def portal_of(name: str, namespace: str, control_socket: Path) -> str:
    """Return the portal of the Service *name* (``NAME[:PORT]``) as ``IP:PORT/protocol``, as the proxy answers."""
    service, _, port = name.partition(":")
    answer = ask(control_socket, "why", namespace=namespace, name=service, port=port)
    if not answer["portal"]:
        obstacle = answer["obstacle"] or {"reason": "it has no portal", "fix": ""}
        fail(f"{namespace}/{service}: {obstacle['reason']}; {obstacle['fix']}")
    return f"{answer['portal']}/{answer['port'].rpartition('/')[2].lower()}"


# ---- output


def _explained(answer: Row) -> Iterable[str]:
    yield f"{answer['service']} port {answer['port'] or '-'}, {answer['mode']} mode"
    if answer["obstacle"]:
        yield f"clients cannot reach it: {answer['obstacle']['reason']}"
        yield f"  fix: {answer['obstacle']['fix']}"
    yield from _candidates(answer)
    if answer["unused"]:
        yield "not:" if answer["next"] else "its endpoints:"
        for endpoint in answer["unused"]:
            yield f"  {endpoint['endpoint']}: {endpoint['why']}"
    if answer["rules"] != "none":
        yield f"rules in the kernel: {answer['rules']}"
    for note in answer["notes"]:
        yield f"note: {note}"
    for unknown in answer["unknown"]:
        yield f"not known: {unknown}"


def _candidates(answer: Row) -> Iterable[str]:
    client = f" of {answer['client']}" if answer["client"] else ""
    for at, candidate in enumerate(answer["next"]):
        if not at:
            yield f"the next connection{client} to {answer['portal']} gets:"
        share = candidate["probability"]
        odds = "" if share >= 1 else f" with probability {share:.3g}"
        yield f"  {candidate['endpoint']}{odds}: {candidate['why']}"


class Column(NamedTuple):
    """A column: its head, what it shows of a row (a function, or a field that is never empty), and when."""

    head: str
    show: Callable[[Row], object] | str
    when: Literal["always", "wide", "everywhere"] = "always"

    def cell(self, row: Row) -> str:
        return str(row[self.show] if isinstance(self.show, str) else self.show(row))


_NAMESPACE = Column("NAMESPACE", "namespace", "everywhere")
_COLUMNS: Mapping[str, Sequence[Column]] = {
    "services": (
        _NAMESPACE,
        Column("NAME", "name"),
        Column("TYPE", "type"),
        Column("CLUSTER-IP", lambda row: ",".join(row["cluster_ips"]) or "<none>"),
        Column("EXTERNAL-IP", lambda row: ",".join(row["external_ips"]) or "<none>"),
        Column("PORT(S)", lambda row: ",".join(row["ports"]) or "<none>"),
        Column("AGE", lambda row: _age(time.time() - row["since"]) if row["since"] else "<unknown>"),
        Column("SELECTOR", lambda row: _labels(row["selector"]), "wide"),
    ),
    "endpoints": (
        _NAMESPACE,
        Column("SERVICE", "service"),
        Column("PORT", lambda row: row["port"] or "<none>"),
        Column("ENDPOINT", "address"),
        Column("STATE", lambda row: _state(row)),
        Column("WEIGHT", "weight"),
        Column("OPEN", "open"),
        Column("PINS", "pins"),
        Column("LAST FAILURE", lambda row: _last_failure(row)),
        Column("NODE", lambda row: row["node"] or "<none>", "wide"),
        Column("REASON", "reason", "wide"),
    ),
    "connections": (
        _NAMESPACE,
        Column("SERVICE", "service"),
        Column("PROTOCOL", "protocol"),
        Column("CLIENT", "client"),
        Column("PORTAL", lambda row: row["portal"] or "<unknown>"),
        Column("ENDPOINT", lambda row: row["endpoint"] or "<dialling>"),
        Column("AGE", lambda row: _age(row["age_s"])),
        Column("WHY", "why", "wide"),
        Column("UP", "bytes_to_backend", "wide"),
        Column("DOWN", "bytes_to_client", "wide"),
    ),
    "events": (
        Column("AGE", lambda row: _age(time.time() - row["at"])),
        Column("COUNT", "count"),
        Column("EVENT", "what"),
    ),
}


def _table(kind: str, items: Iterable[Row], *, wide: bool = False, everywhere: bool = False) -> list[list[str]]:
    """Return the heads and the rows of *items*."""
    shown = [one for one in _COLUMNS[kind] if {"wide": wide, "everywhere": everywhere}.get(one.when, True)]
    return [[one.head for one in shown], *([printable(one.cell(row)) for one in shown] for row in items)]


def _state(row: Row) -> str:
    if row["state"] == "ejected" and row["until"]:
        return f"ejected ({max(row['until'] - time.time(), 0):.0f}s)"
    return str(row["state"]) + (f" ({row['share']:.0%})" if row["share"] < 1 else "")


def _last_failure(row: Row) -> str:
    return f"{row['last_failure']} ({_age(time.time() - row['failed_at'])})" if row["failed_at"] else "<none>"


def _labels(labels: Mapping[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items())) or "<none>"


def _without_ages(row: Sequence[str]) -> str:
    return re.sub(r"\b\d+[dhms]\b", "", " ".join(row))


def _age(seconds: float) -> str:
    """Return a time span as kubectl shows it: in one unit."""
    for unit, name in ((86_400, "d"), (3_600, "h"), (60, "m")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f}{name}"
    return f"{max(seconds, 0):.0f}s"


def _print_rows(rows: Iterable[Sequence[str]], widths: Sequence[int], indent: str = "") -> None:
    for row in rows:
        click.echo((indent + "   ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))).rstrip())


def _widths(rows: Iterable[Sequence[str]]) -> list[int]:
    return [max(map(len, cells)) for cells in zip(*rows, strict=True)]


def _dump(answer: Row, output: str) -> None:
    if output == "json":
        click.echo(json.dumps(answer, indent=2))
        return
    import yaml

    click.echo(yaml.safe_dump(answer, sort_keys=False, allow_unicode=True), nl=False)
