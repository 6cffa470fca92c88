"""Prints a trace as a tree: with colours on a terminal, as plain text in a pipe."""

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from userspace_proxy.trace.paths import PacketPath, StageLine, packet_paths
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
    for path in packet_paths(trace, folded=False):
        console.print(_tree(path))
    if trace.flow is not None:
        flow = f"conntrack: {trace.flow.original}, answers {trace.flow.reply}"
        console.print(Text(f"{flow}  {trace.flow.state}".rstrip(), "dim"))
    for note in trace.notes:
        console.print(Text(note, "yellow"))
    console.print(Text(trace.outcome, "bold"))


def _tree(path: PacketPath) -> Tree:
    tree = Tree(Text.assemble((path.title, "bold"), f"  {path.aside}"), guide_style="dim")
    for stage in path.stages:
        title = Text.assemble((stage.title, _TITLES[stage.kind]), (f"  {stage.aside}", "dim"))
        branches = [tree.add(title)]  # the branch for lines of each depth
        for line in stage.lines:
            del branches[line.depth + 1 :]
            branches.append(branches[-1].add(_line(line)))
    return tree


def _line(line: StageLine) -> Text:
    mark = "= " if line.kind == "element" else ""
    return Text(f"{mark}{line.text}", _STYLES[line.kind])
