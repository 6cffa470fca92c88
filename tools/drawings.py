"""`make drawings`: traces and draws one client packet for each mode, in private namespaces.

A mode that this kernel or build lacks is skipped with a message. On a machine that has it, ``--print ipvs`` prints the
recording. The file with it can be given here in place of a mode.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from pathlib import Path

import click
import msgspec

from userspace_proxy.errors import StartError
from userspace_proxy.lab import (
    Lab,
    ServiceLab,
    ask,
    build_service_lab,
    enter_namespaces,
    prepare,
    start_nginx,
    start_proxy,
)
from userspace_proxy.trace.analysis import Recording, analyse
from userspace_proxy.trace.svg import drawing
from userspace_proxy.trace.tracer import TraceRequest, follow

PORTAL, PORT = "10.96.0.11", 80  # the portal of examples/cluster-ip
_EXAMPLE = Path("examples/cluster-ip")
_STOP_TIMEOUT_S, _PACKET_TIMEOUT_S = 20.0, 10.0


def record(world: ServiceLab, folder: Path, mode: str, *arguments: str) -> Recording:
    """Run *mode* on the node with the example's Service, and follow the client's first packet.

    Raises:
        StartError: this machine or this build does not have the mode.
    """
    proxy = start_proxy(world.node, _EXAMPLE, folder / f"{mode}.log", "--proxy-mode", mode, *arguments)
    client = threading.Thread(target=ask, args=(world.client, PORTAL, PORT))
    request = TraceRequest(PORTAL, PORT, "tcp", awaited_s=_PACKET_TIMEOUT_S)
    try:
        with world.node.inside():
            recording = follow(request, on_ready=client.start)
        client.join()
        return recording
    finally:
        proxy.terminate()
        proxy.wait(_STOP_TIMEOUT_S)


def _recorded(mode: str) -> Recording:
    with tempfile.TemporaryDirectory(dir="/run") as temporary, Lab() as lab:
        world = build_service_lab(lab, pods=3)
        for pod in world.pods:
            start_nginx(pod, Path(temporary))
        return record(world, Path(temporary), mode)


def _draw(mode: str, recording: Recording, folder: Path) -> str:
    trace = analyse(recording)
    if not trace.legs:
        raise StartError(f"{mode}: {trace.outcome}")
    title = f"Mode {mode}: a packet to {trace.portal}"
    (folder / f"{mode}.svg").write_text(drawing(trace, title))
    (folder / f"{mode}-wide.svg").write_text(drawing(trace, title, wide=True))
    return trace.outcome


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("modes", nargs=-1, required=True)
@click.option("--print", "printed", is_flag=True, help="Print the recording as JSON; draw nothing.")
def main(folder: Path, modes: tuple[str, ...], *, printed: bool) -> None:
    """Draw a packet's path in each of MODES (names, or files written by --print) into FOLDER."""
    try:
        enter_namespaces(sys.argv[1:], {}, module="tools.drawings")
        prepare()
        for mode in modes:
            _make(mode, folder, printed=printed)
    except StartError as error:
        sys.exit(f"drawings: {error}")


def _make(mode: str, folder: Path, *, printed: bool) -> None:
    file = Path(mode)
    try:
        is_file = file.suffix == ".json"
        recording = msgspec.json.decode(file.read_bytes(), type=Recording) if is_file else _recorded(mode)
    except StartError as error:
        click.echo(f"{mode}: not drawn, {error}", err=True)
        return
    if printed:
        click.echo(msgspec.json.format(msgspec.json.encode(recording)))
    else:
        folder.mkdir(parents=True, exist_ok=True)
        click.echo(f"{file.stem}: {_draw(file.stem, recording, folder)}")


if __name__ == "__main__":
    main()
