"""Tells transformers about aerogel's loader, without importing transformers.

`import aerogel` must be quick, and importing transformers is not. So a finder is put in front of `sys.meta_path` that
knows one module: when `transformers.quantizers.auto` is imported, by whoever and whenever, `quantizer.register` runs
right after it. Where that module is loaded already, it runs at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

HOOKED = "transformers.quantizers.auto"


def install_hook() -> None:
    """Registers the loader now, or as soon as transformers' quantizers are imported. Doing it again changes nothing."""
    if HOOKED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    import_module("aerogel.model.quantizer").register()


class _Finder(MetaPathFinder):
    """Finds `HOOKED` as usual, once, and wraps its loader."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """None for every other module."""
        if fullname != HOOKED:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    """Runs a module with its own loader, then registers."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader does."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """The module first; then aerogel's entries in its tables, which it must be importable for."""
        self.loader.exec_module(module)
        _register()
