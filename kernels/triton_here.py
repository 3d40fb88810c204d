"""Whether Triton can compile and launch kernels on this machine."""

from __future__ import annotations

import os
import shutil
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any


def missing() -> str | None:
    """What it lacks, as a sentence, or None. Does not import Triton."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")):
        return "Triton needs a C compiler for its launcher, and there is no gcc, clang or cc"
    return None


def language() -> tuple[Any, Any]:
    """`triton` and `triton.language`; where they are not installed, stand-ins with which a module of kernels can be imported
    and looked at. `missing` says why nothing in it is run."""
    try:
        return import_module("triton"), import_module("triton.language")
    except ImportError:
        return SimpleNamespace(jit=_undecorated), SimpleNamespace(constexpr=lambda value: value)


def _undecorated(function: Any = None, **options: Any) -> Any:
    return _undecorated if function is None else function
