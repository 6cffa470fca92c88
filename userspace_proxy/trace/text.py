"""Prints a trace as a tree: with colours on a terminal, as plain text in a pipe."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from userspace_proxy.trace.lanes import Lane, Line, lanes
from userspace_proxy.trace.values import PacketTrace

_STYLES = {
    "chain": "cyan",
    "rule": "",
    "decides": "bold",
    "element": "green",
    "skipped": "dim",
    "change": "bold yellow",
    "note": "green",
}
_TITLES = {
    "hook": "bold cyan",
    "ipvs": "bold magenta",
    "process": "bold magenta",
    "outside": "bold",
    "stop": "bold red",
}


def show(trace: PacketTrace, console: Console) -> None:
    """Print *trace* on *console*."""
    for lane in lanes(trace, folded=False):
        console.print(_tree(lane))
    if trace.flow is not None:
        flow = f"conntrack: {trace.flow.original}, answers {trace.flow.reply}"
        console.print(Text(f"{flow}  {trace.flow.state}".rstrip(), "dim"))
    for note in trace.notes:
        console.print(Text(note, "yellow"))
    console.print(Text(trace.outcome, "bold"))


def _tree(lane: Lane) -> Tree:
    tree = Tree(Text.assemble((lane.title, "bold"), f"  {lane.aside}"), guide_style="dim")
    for station in lane.stations:
        title = Text.assemble((station.title, _TITLES[station.kind]), (f"  {station.aside}", "dim"))
        branches = [tree.add(title)]  # the branch for lines of each depth
        for line in station.lines:
            del branches[line.depth + 1 :]
            branches.append(branches[-1].add(_line(line)))
    return tree


def _line(line: Line) -> Text:
    mark = "= " if line.kind == "element" else ""
    return Text(f"{mark}{line.text}", _STYLES[line.kind])
