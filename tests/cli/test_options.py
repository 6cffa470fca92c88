"""The table of settings: each entry has a flag, a line of help, a place in the reference, and a real field."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import msgspec
import pytest
from click.testing import CliRunner

from tools.flags import page
from userspace_proxy.cli import COMMANDS, HELP_WIDTH, commands
from userspace_proxy.cli.run import run, settings_from
from userspace_proxy.config.kubeproxy_config import CONFIGURATION
from userspace_proxy.config.settings import SETTINGS, Settings

# The metavar of a kind -> a value that is no setting's default.
VALUES = {
    "NUMBER": "7",
    "DURATION": "7s",
    "NAME": "seven",
    "FILE": "seven.yaml",
    "FOLDER": "/seven",
    "ADDRESS": "127.0.0.7:7",
    "A-B": "700-777",
    "CIDR[,CIDR]": "10.7.0.0/16",
    "CIDR,...": "10.7.0.0/16",
    "[ADDRESS]": "10.96.0.7",
    "ADDRESS,...": "10.7.0.7",
    "DOMAIN": "seven.example",
}


def given(name: str) -> list[str]:
    """Return arguments that change the setting *name*."""
    setting = SETTINGS[name]
    flag, default = setting.flag.split(", ")[-1], getattr(Settings(), name)
    if isinstance(default, bool):
        return [flag.replace("--", "--no-", 1) if default else flag]
    other = next((word for word in setting.kind.known if word != str(default)), None)
    return [flag, other or VALUES[setting.kind.metavar]]


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_reached_by_its_flag_and_by_no_other(name: str) -> None:
    paths = [] if name in ("kubeconfig", "in_cluster") else ["services.yaml"]
    options = run.make_context("run", [*paths, *given(name)]).params
    told = settings_from(options.pop("configuration"), options)

    assert told != dataclasses.replace(told, **{name: getattr(Settings(), name)}), "it is changed"
    assert dataclasses.replace(told, **{name: getattr(Settings(), name)}) == Settings(paths=tuple(paths))


@pytest.mark.parametrize("command", ["run", "check", "render"])
def test_help_has_one_line_for_each_setting_and_the_reference_has_an_item(command: str) -> None:
    text = CliRunner().invoke(commands, [command, "--help"], terminal_width=HELP_WIDTH).output
    reference = page().split(f"## {command}\n")[1].split("\n## ")[0]
    rows = [line for line in text.partition("Options:")[2].partition("Examples:")[0].splitlines() if line[:1] == " "]

    assert all(re.match(r"  -.*?  +\S", row) for row in rows), "no option takes two lines"
    for setting in SETTINGS.values():
        if command in setting.commands:
            flag = setting.flag.rpartition("--")[2]
            assert len([row for row in rows if re.search(rf"[\]-]{flag} ", row) and setting.help in row]) == 1, flag
            assert f"{flag} {setting.kind.metavar}".rstrip() in reference


@pytest.mark.parametrize("arguments", [["--dns", "a.yaml"], ["a.yaml", "--dns"], ["a.yaml", "--dns", "--verbose"]])
def test_dns_without_an_address_is_at_the_tenth_of_each_range(arguments: list[str]) -> None:
    ranges = ["--service-cluster-ip-range", "10.96.0.0/16,fd00::/112"]
    options = run.make_context("run", [*arguments, *ranges]).params
    told = settings_from(options.pop("configuration"), options)

    assert (told.paths, told.dns_addresses) == (("a.yaml",), ("10.96.0.10", "fd00::a"))


def test_examples_stand_at_the_end_of_help_as_they_are_written() -> None:
    text = CliRunner().invoke(commands, ["run", "--help"], terminal_width=HELP_WIDTH).output

    *_, examples = text.split("\n\n")
    assert examples.startswith("Examples:\n")
    assert "\n    userspace-proxy run manifests/\n" in examples


@pytest.mark.parametrize("path", [path for setting in SETTINGS.values() for path in setting.fields])
def test_every_field_of_the_table_is_one_of_a_kube_proxy_configuration(path: str) -> None:
    section: object = CONFIGURATION(apiVersion="", kind="")
    for name in path.split("."):
        assert isinstance(section, msgspec.Struct)
        known = {field.encode_name: field.name for field in msgspec.structs.fields(section)}
        assert name in known
        section = getattr(section, known[name])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workers", "65"], "65 is not in the range; write 0 to 64"),
        (["--workers", "two"], "'two' is no whole number"),
        (["--loop", "trio"], "'trio' is not known; write one of uvloop, asyncio"),
    ],
)
def test_a_wrong_value_of_a_flag_is_a_usage_error_that_says_what_to_write(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(commands, ["run", *arguments])

    assert done.exit_code == 2
    assert said in done.output


@pytest.mark.parametrize("name", ["run", "check", "render", "forward", "lab", "demo", "cleanup"])
def test_a_command_imports_no_other_one(name: str) -> None:
    code = f"import sys; from userspace_proxy.cli import load; load({name!r}); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    package = "userspace_proxy.cli."
    files = {module.removeprefix(package) for module in loaded if module.startswith(package)}
    assert files & {*COMMANDS.values()} == {COMMANDS[name]}
