"""The CUDA sources of this folder as loaded kernels: read, compile for the device at hand, keep in memory.

Each `.cu` file is a lesson on one kernel family and includes the `.cuh` files, which hold what they share. A kernel is
specialised by macros; `function` gives the loaded kernel for a set of them, compiled the first time it is asked for.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from aerogel.kernels.cuda import nvrtc
from aerogel.kernels.cuda.launch import Function

FOLDER = Path(__file__).parent
_loaded: dict[tuple[object, ...], Function] = {}
_lock = threading.Lock()


@functools.cache
def texts() -> Mapping[str, str]:
    """Every source file of this folder by its name."""
    return {path.name: path.read_text("utf-8") for path in sorted(FOLDER.iterdir()) if path.suffix in (".cu", ".cuh")}


def sources_of(name: str) -> dict[str, str]:
    """A source with all headers, which is what its compilation may depend on."""
    return {file: text for file, text in texts().items() if file == name or file.endswith(".cuh")}


def code(name: str, defines: nvrtc.Defines, capability: nvrtc.Capability) -> bytes:
    """The cubin of the file `name`. Errors as in `nvrtc.Compiler.compile`; needs no GPU."""
    return nvrtc.cubin(name, sources_of(name), defines, capability)


def function(name: str, kernel: str, defines: nvrtc.Defines, device: torch.device) -> Function:
    """Kernel `kernel` of the file `name`, loaded on `device` (which must be torch's current one)."""
    key = (name, kernel, tuple(sorted(defines.items())), device.index)
    with _lock:
        found = _loaded.get(key)
    if found is None:
        binary = code(name, defines, torch.cuda.get_device_capability(device))  # several threads may compile at once
        with _lock:
            found = _loaded.get(key) or _loaded.setdefault(key, Function(binary, kernel))
    return found


def compile_ahead(wanted: Iterable[tuple[str, nvrtc.Defines]], capability: nvrtc.Capability, workers: int = 8) -> None:
    """Compiles several kernels at once into the cache on disk; the compiler runs outside Python's lock."""
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(lambda item: code(item[0], item[1], capability), wanted):
            pass
