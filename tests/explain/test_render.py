"""`userspace-proxy render` as a process: one Service, every mode, explained, without privileges; tools read it."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.explain.shop import SHOP, WAYS, render
from tests.modes.redirect_cases import assert_golden
from userspace_proxy.lab import Host, Lab

WITHOUT_PRIVILEGES = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs")
WEB = ("-", "--service", "shop/web", "--cluster-cidr", "10.244.0.0/16", "--explain")
# A golden file's name -> how the mode is asked for.
MODES = {
    f"{mode.name}-{language}" if len(mode.languages) > 1 else mode.name: (
        *("--proxy-mode", mode.name),
        *(("--rules", language) if len(mode.languages) > 1 else ()),
    )
    for mode, language in WAYS
}


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with Lab() as lab:
        yield lab.add("rules")


@pytest.mark.parametrize("mode", MODES)
def test_the_explanation_of_one_service_equals_its_golden_file(mode: str) -> None:
    done = render(*WEB, *MODES[mode])

    assert (done.returncode, done.stderr) == (0, "")
    assert_golden(f"explain-{mode}.txt", done.stdout)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wanted", [WEB, ("-", "--explain"), ("-", "--service", "dns")])
def test_the_shown_rules_are_loadable_by_their_tool(mode: str, wanted: tuple[str, ...], host: Host) -> None:
    shown = render(*wanted, *MODES[mode])
    assert (shown.returncode, shown.stderr) == (0, "")
    text = shown.stdout

    if "table inet" in text:
        # What stands behind the table is for other tools, each named in a comment.
        table = text.partition("\n# ip -batch -\n")[0]
        done = host.run("nft", "--check", "-f", "-", stdin=table, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        return
    parts = re.split(r"^# (ip6?tables-restore) --noflush$", text, flags=re.MULTILINE)
    assert len(parts) >= 3
    for tool, part in zip(parts[1::2], parts[2::2], strict=True):
        done = host.run(tool, "--test", "--noflush", stdin=part, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_every_mode_is_explained_without_privileges() -> None:
    done = render("-", "--explain", "--proxy-mode", "all", before=WITHOUT_PRIVILEGES)

    assert (done.returncode, done.stderr) == (0, "")
    assert re.findall(r"^# ---- (.+?) -+$", done.stdout, re.MULTILINE) == list(map(str, WAYS))
    may = subprocess.run([*WITHOUT_PRIVILEGES, "grep", "CapEff", "/proc/self/status"], capture_output=True, text=True)
    assert int(may.stdout.split()[1], 16) == 0


def test_json_has_each_line_with_its_explanation_and_service() -> None:
    modes = json.loads(render("-", "--service", "shop/web", "--proxy-mode", "all", "--json").stdout)

    assert [(mode["mode"], mode["language"]) for mode in modes] == [(mode.name, language) for mode, language in WAYS]
    for mode in modes:
        assert {"text", "explanation", "service"} == set(mode["lines"][0])
        assert {line["service"] for line in mode["lines"]} == {"", "shop/web:http"}
    led = next(line for line in modes[0]["lines"] if "10.96.0.1 " in line["text"])
    assert re.fullmatch(
        r"Packets to the cluster IP 10.96.0.1:80 \(TCP\) go to our proxy port \d+\.", led["explanation"]
    )
    assert "DNAT" in modes[2]["words"]


def test_without_flags_all_rules_are_printed_without_reasons() -> None:
    whole = render("-").stdout

    assert whole.startswith(
        "table inet userspace_proxy\ndelete table inet userspace_proxy\ntable inet userspace_proxy {"
    )
    assert "#" not in whole
    assert all(name in whole for name in ("shop/web:http", "shop/dns:dns", "office/web"))


def test_node_ports_are_at_the_primary_address_of_this_host_as_in_run(host: Host) -> None:
    host.ip("address", "add", "192.0.2.1/32", "dev", "lo")

    shown = render("-", "--proxy-mode", "nftables", before=host.command()).stdout

    assert "ip daddr { 192.0.2.1/32 } fib daddr type local ip daddr != 127.0.0.0/8 jump node_ports4" in shown


def test_a_missing_service_is_reported_in_one_line() -> None:
    done = render("-", "--service", "db")

    assert done.returncode == 1
    assert done.stderr.startswith("userspace-proxy: --service: no Service is called 'db'; there is: ")


def in_terminal(columns: int, *arguments: str) -> str:
    """Return the output to a terminal of this width."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "userspace_proxy", "render", *arguments]
    environment = {**os.environ, "COLUMNS": str(columns), "LINES": "50", "TERM": "xterm-256color"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=theirs, env=environment) as process:
        os.close(theirs)
        assert process.stdin is not None
        process.stdin.write(SHOP.encode())
        process.stdin.close()
        printed = b""
        try:
            while part := os.read(ours, 1 << 16):
                printed += part
        except OSError:  # how a terminal ends
            pass
    os.close(ours)
    assert process.returncode == 0
    return printed.decode()


@pytest.mark.parametrize(("columns", "headings"), [(80, 1), (120, 1), (160, 2), (200, 2)])
def test_a_wide_terminal_has_two_modes_side_by_side_and_no_line_is_too_long(columns: int, headings: int) -> None:
    printed = in_terminal(columns, "-", "--service", "shop/web", "--proxy-mode", "all", "--explain")

    assert "\x1b[" in printed
    rows = re.sub(r"\x1b\[[0-9;]*m", "", printed).splitlines()
    assert max(map(len, rows)) <= columns
    first = next(row for row in rows if row.startswith("userspace (nftables)"))
    assert len(re.findall(r"userspace \(\w+\) ─", first)) == headings
