"""Change the data plane a little, in one place at a time, and see whether the histories and tests notice.

`python -m tests.simulation.mutation SEED COUNT` draws COUNT mutants of the modules below and lists the survivors. Each
mutant is one process: its function gets other code, then histories are played until one is broken. If none is, the
module's tests with real sockets run, to which this module is a plugin.

With a third argument, the name of a file, verdicts are added to that file, and mutants with a verdict there are not run
again. Remove the file when the code of the modules changes.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import random
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

from tests.simulation.equivalent import EQUIVALENT
from tests.simulation.play import play

_PACKAGE = "userspace_proxy.dataplane"
MODULES = ("picker", "dial", "tcp", "udp", "splice.copy", "splice.pipe")
# Functions that no history calls: they answer questions, or serve settings that the histories do not have.
_NOT_PLAYED = {"preview", "details", "name", "spec", "sock", "_why", "header", "_header", "_name", "seen_client"}
_HISTORIES = 150
_CPU_S = 100
_PROCESSES = 2
_NOT_PLAYED_STATUS = 99
_TEST_TIMEOUT_S = 40
_UNCHANGED = -1
_WITH_FILE = 3
_KILLED_LEAST = 0.9
_VARIABLE = "USERSPACE_PROXY_MUTANT"
_DATAPLANE = "tests/dataplane"
# The tests with real sockets of each module.
_TESTS = {
    "picker": (f"{_DATAPLANE}/test_picker.py", f"{_DATAPLANE}/balancing", f"{_DATAPLANE}/test_tcp.py"),
    "dial": (f"{_DATAPLANE}/test_dial.py", f"{_DATAPLANE}/test_tcp.py", f"{_DATAPLANE}/test_lifetimes.py"),
    "tcp": (f"{_DATAPLANE}/test_tcp.py", f"{_DATAPLANE}/test_lifetimes.py", f"{_DATAPLANE}/test_proxy_protocol.py"),
    "udp": (f"{_DATAPLANE}/test_udp.py",),
    "splice.copy": ("tests/contract/test_splicer.py", "tests/contract/test_splicer_bugs.py"),
    "splice.pipe": ("tests/contract/test_splicer.py", f"{_DATAPLANE}/test_pipes.py"),
}

_OTHER: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
}


class Mutant(NamedTuple):
    """A changed function: its module and name, the line, and what is changed."""

    module: str
    function: str
    line: int
    what: str
    number: int  # among the changes of its module

    @property
    def place(self) -> tuple[str, str, str]:
        """What stays when lines are added above it."""
        return self.module, self.function, self.what

    def __str__(self) -> str:
        return f"{self.module}.py:{self.line} {self.function}: {self.what}"


def _changes(node: ast.AST) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield what can be changed at *node*: in words, and the change itself."""

    def swap(of: Any, name: str) -> Callable[[], None]:
        return lambda: setattr(of, name, _OTHER[type(getattr(of, name))]())

    def put(of: Any, name: str, value: ast.AST) -> Callable[[], None]:
        return lambda: setattr(of, name, value)

    match node:
        case ast.Compare(ops=[op]) if type(op) in _OTHER:
            yield "another comparison", lambda: node.ops.__setitem__(0, _OTHER[type(op)]())  # type: ignore[call-overload]
        case ast.BoolOp() | ast.BinOp(op=ast.Add() | ast.Sub()) | ast.AugAssign(op=ast.Add() | ast.Sub()):
            yield "another operator", swap(node, "op")
        case ast.Constant(value=bool() as known):
            yield f"{not known} for {known}", lambda: setattr(node, "value", not known)
        case ast.Constant(value=int() | float() as number):
            yield f"{number + 1} for {number}", lambda: setattr(node, "value", number + 1)
        case ast.If() | ast.While() | ast.IfExp():
            yield "the opposite condition", put(node, "test", ast.UnaryOp(ast.Not(), node.test))
        case ast.Expr(value=ast.Call()):
            yield "not called", put(node, "value", ast.Constant(None))
        case ast.Assign(targets=[ast.Attribute()]):
            yield "not set", put(node, "targets", [ast.Name("_unused", ast.Store())])  # type: ignore[arg-type]
        case ast.Return(value=ast.expr() as value) if getattr(value, "value", ...) is not None:
            yield "None returned", put(node, "value", ast.Constant(None))


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for top in tree.body:
        if isinstance(top, ast.FunctionDef):
            yield top.name, top
        elif isinstance(top, ast.ClassDef):
            for member in top.body:
                if isinstance(member, ast.FunctionDef):
                    yield f"{top.name}.{member.name}", member


def _all_changes(tree: ast.Module) -> Iterator[tuple[str, ast.AST, str, Callable[[], None]]]:
    for function, body in _functions(tree):
        if body.name in _NOT_PLAYED:
            continue
        for statement in body.body:
            for node in ast.walk(statement):
                if not ast.unparse(node).startswith(("log.", "assert ")):
                    for what, change in _changes(node):
                        yield function, node, what, change


def mutants(name: str) -> list[Mutant]:
    """Return all mutants of the module *name*."""
    tree = ast.parse(inspect.getsource(importlib.import_module(f"{_PACKAGE}.{name}")))
    return [
        Mutant(name, function, node.lineno, f"{what} in `{ast.unparse(node).splitlines()[0]}`", index)  # type: ignore[attr-defined]
        for index, (function, node, what, _) in enumerate(_all_changes(tree))
    ]


def draw(seed: int, count: int) -> list[Mutant]:
    everything = [mutant for name in MODULES for mutant in mutants(name)]
    return random.Random(seed).sample(everything, min(count, len(everything)))


def apply(mutant: Mutant) -> None:
    """Give the function of *mutant* its changed code, in this process."""
    if mutant.number == _UNCHANGED:
        return
    module = importlib.import_module(f"{_PACKAGE}.{mutant.module}")
    tree = ast.parse(inspect.getsource(module))
    list(_all_changes(tree))[mutant.number][3]()
    code: CodeType = compile(ast.fix_missing_locations(tree), str(module.__file__), "exec", dont_inherit=True)
    live: Any = module
    for part in mutant.function.split("."):
        code = next(c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == part)
        live = live.__dict__[part]
    live = live.fget if isinstance(live, property) else live
    _replace(live, code)


def _replace(function: Any, code: CodeType) -> None:
    function.__code__ = code


def pytest_configure() -> None:
    """Apply the mutant that the environment names: pytest loads this module as a plugin then."""
    module, _, number = os.environ.get(_VARIABLE, "").partition(":")
    if number and int(number) != _UNCHANGED:
        apply(mutants(module)[int(number)])


def _start(mutant: Mutant) -> int:
    """Play histories of *mutant* in a child process, which exits with 0 if none is broken. Return its pid."""
    if pid := os.fork():
        return pid
    status = _NOT_PLAYED_STATUS
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S))  # a mutant may never end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a broken mutant has much to say
        apply(mutant)
        if play(0, _HISTORIES, 1)[1]:
            os._exit(1)
        status = not _passes_tests(mutant)
    finally:
        os._exit(status)


def _passes_tests(mutant: Mutant) -> bool:
    """Run the tests with real sockets, which find what is not in the model. A test that fails runs again, alone."""
    failed = _failed_tests(mutant, _TESTS[mutant.module])
    return not failed or not _failed_tests(mutant, failed)


def _failed_tests(mutant: Mutant, tests: Sequence[str]) -> Sequence[str]:
    """Return the first of *tests* that fails with *mutant*; all of them if none can be named; none if all pass."""
    options = ("-x", "-q", "-rfE", "--timeout", f"{_TEST_TIMEOUT_S}", "-p", "no:cacheprovider", "-p", __spec__.name)
    command = [sys.executable, "-m", "pytest", *options, *tests]
    environment = {**os.environ, _VARIABLE: f"{mutant.module}:{mutant.number}"}
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    return () if not run.returncode else re.findall(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.MULTILINE) or tests


def survivors(chosen: list[Mutant], tell: Callable[[str], object] = lambda _: None) -> list[Mutant]:
    """Return those of *chosen* that break no history and fail no test; *tell* each verdict.

    The unchanged code of each module has to survive first: on a machine that is too busy, time-outs would kill it, too.
    """
    unchanged = [Mutant(name, "", 0, "unchanged", _UNCHANGED) for name in sorted({m.module for m in chosen})]
    if killed := set(unchanged) - set(_survivors(unchanged, tell)):
        raise AssertionError(f"killed without a change: {killed}")
    return _survivors(chosen, tell)


def _survivors(chosen: list[Mutant], tell: Callable[[str], object]) -> list[Mutant]:
    running: dict[int, Mutant] = {}
    left, alive = list(chosen), []
    while left or running:
        while left and len(running) < _PROCESSES:
            mutant = left.pop()
            running[_start(mutant)] = mutant
        pid, status = os.wait()
        mutant = running.pop(pid)
        assert os.waitstatus_to_exitcode(status) != _NOT_PLAYED_STATUS, f"not played: {mutant}"
        if status == 0:
            alive.append(mutant)
        tell(f"{'killed' if status else 'alive'} {mutant}\n")
    return sorted(alive)


def verdicts(chosen: list[Mutant], known: Path | None) -> dict[Mutant, bool]:
    """Return whether each of *chosen* is killed. The file *known* holds earlier verdicts and gets the new ones."""
    lines = known.read_text().splitlines() if known is not None and known.exists() else []
    before = dict(line.partition(" ")[::-2] for line in lines)
    new = [mutant for mutant in chosen if str(mutant) not in before]

    def tell(line: str) -> None:
        sys.stderr.write(line)
        if known is not None and "unchanged" not in line:
            with known.open("a") as file:
                file.write(line)

    alive = set(survivors(new[::-1], tell)) if new else set()
    found = {mutant: before[str(mutant)] == "killed" for mutant in chosen if str(mutant) in before}
    return {**found, **{mutant: mutant not in alive for mutant in new}}


def main() -> int:
    seed, count = map(int, sys.argv[1:3])
    known = Path(sys.argv[3]) if len(sys.argv) > _WITH_FILE else None
    found = verdicts(draw(seed, count), known)
    alive = sorted(mutant for mutant, is_killed in found.items() if not is_killed)
    for mutant in alive:
        sys.stdout.write(f"{mutant}: {EQUIVALENT.get(mutant.place, 'not found')}\n")
    judged = [mutant for mutant in found if mutant.place not in EQUIVALENT]
    killed = sum(found[mutant] for mutant in judged)
    sys.stdout.write(
        f"{killed} of {len(judged)} mutants are killed; {len(found) - len(judged)} others are equivalent\n"
    )
    return killed < len(judged) * _KILLED_LEAST


if __name__ == "__main__":
    sys.exit(main())
