"""A userspace-mode Kubernetes service proxy.

Its programs may run with privileges in a folder of any user. So neither Python nor a tool is looked for in the current
folder, by this process or its children: relative entries of PATH and PYTHONPATH are dropped before any other import.
"""

# ruff: noqa: PTH100, PTH117, PTH120 - nothing is imported that Python has not imported before us
import os
import sys

__version__ = "0.1.0"


def absolute_entries(path: str) -> str:
    """Return *path*, a list of folders as in PATH, without its relative and empty entries."""
    return os.pathsep.join(entry for entry in path.split(os.pathsep) if os.path.isabs(entry))


def _leave_current_folder_out() -> None:
    given = "" if sys.flags.ignore_environment else os.environ.get("PYTHONPATH", "")
    _drop_relative_modules(given)
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    not_installed = "" if home in sys.path else home
    if modules := os.pathsep.join(filter(None, [absolute_entries(given), not_installed])):
        os.environ["PYTHONPATH"] = modules
    else:
        os.environ.pop("PYTHONPATH", None)
    # Without PATH the system's folders are searched; with an empty one the current folder.
    os.environ["PATH"] = absolute_entries(os.environ.get("PATH", "")) or os.defpath


def _drop_relative_modules(pythonpath: str) -> None:
    """Drop the current folder and the relative entries of *pythonpath* from where modules are looked for."""
    if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:  # `python -m userspace_proxy`, which is being looked for
        del sys.path[0]
    for entry in pythonpath.split(os.pathsep) if pythonpath else ():
        if not os.path.isabs(entry) and (found := os.path.abspath(entry)) in sys.path:
            sys.path.remove(found)


_leave_current_folder_out()
