"""Change the data plane a little, in one place at a time, and see whether the histories notice.

`python -m tests.simulation.mutation SEED COUNT` draws COUNT mutants of the modules below and lists the survivors. Each
mutant is one process: its function gets other code, then histories are played until one is broken.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any, NamedTuple

from tests.simulation.play import play

_PACKAGE = "userspace_proxy.dataplane"
MODULES = ("picker", "dial", "tcp", "udp", "splice.copy", "splice.pipe")
# Functions that no history calls: they answer questions, or serve settings that the histories do not have.
_NOT_PLAYED = {"preview", "details", "name", "spec", "sock", "_why", "header", "_header", "_name", "seen_client"}
_HISTORIES = 150
_TIMEOUT_S = 60
_PROCESSES = 2
_NOT_PLAYED_STATUS = 2

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
        case ast.Return(value=ast.expr()):
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


def _start(mutant: Mutant) -> int:
    """Play histories of *mutant* in a child process, which exits with 0 if none is broken. Return its pid."""
    if pid := os.fork():
        return pid
    status = _NOT_PLAYED_STATUS
    try:
        signal.alarm(_TIMEOUT_S)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a broken mutant has much to say
        apply(mutant)
        status = int(bool(play(0, _HISTORIES, 1)[1]))
    finally:
        os._exit(status)


def survivors(chosen: list[Mutant]) -> list[Mutant]:
    """Return those of *chosen* that break no history."""
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
    return sorted(alive)


def main() -> None:
    seed, count = map(int, sys.argv[1:3])
    chosen = draw(seed, count)
    alive = survivors(chosen)
    sys.stdout.write("".join(f"{mutant}\n" for mutant in alive))
    sys.stdout.write(f"{len(chosen) - len(alive)} of {len(chosen)} mutants are killed\n")


if __name__ == "__main__":
    main()
