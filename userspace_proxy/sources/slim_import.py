"""Imports kubernetes-asyncio without its modules for each API and object of Kubernetes, which a login does not use.

They are more than 800 modules: 32 MB in memory, and three quarters of the time that the import takes.
"""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_UNUSED = (
    *(f"kubernetes_asyncio.client.{each}." for each in ("api", "models")),
    *(f"kubernetes_asyncio.{each}." for each in ("dynamic", "stream", "utils", "watch")),
)


class _Empty(ModuleType):
    """Stands for an unused module. Whatever is imported from it is this class."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Empty


class _EmptyModules(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if f"{fullname}.".startswith(_UNUSED) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: the module stays empty."""


@contextlib.contextmanager
def without_models() -> Iterator[None]:
    """Leave the unused modules out of imports in the block. Later imports load them as usual."""
    finder = _EmptyModules()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if type(module) is _Empty]:
            parent, _, child = name.rpartition(".")
            vars(sys.modules.get(parent, sys.modules.pop(name))).pop(child, None)
