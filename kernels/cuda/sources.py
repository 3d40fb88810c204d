"""The CUDA sources of this folder as loaded kernels: read, compile for the device at hand, keep in memory.

Each `.cu` file is a lesson on one kernel family and includes the `.cuh` files, which hold what they share. A kernel is
specialised by macros; `function` gives the loaded kernel for a set of them, compiled the first time it is asked for.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from aerogel.kernels.cuda import nvrtc
from aerogel.kernels.cuda.launch import Function

FOLDER = Path(__file__).parent
MOST_COMPILERS = 16
"""Threads that compile at once, where there are as many cores; the compiler runs outside Python's lock."""
_loaded: dict[tuple[object, ...], Future[Function]] = {}
_lock = threading.Lock()


class Wanted(NamedTuple):
    """A kernel that a launch needs: the file, the kernel's name in it, and the macros that specialise it."""

    file: str
    kernel: str
    defines: nvrtc.Defines


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
    """Kernel `kernel` of the file `name`, loaded on `device` (which must be torch's current one).

    Several threads may ask at once; one compiles, who wants the same kernel waits for it.
    """
    key = (name, kernel, tuple(sorted(defines.items())), device.index)
    with _lock:
        found = _loaded.get(key)
        first = found is None
        if found is None:
            found = _loaded[key] = Future()
    if first:
        try:
            found.set_result(Function(code(name, defines, torch.cuda.get_device_capability(device)), kernel))
        except BaseException as error:
            with _lock:
                del _loaded[key]  # who asks again may be luckier
            found.set_exception(error)
            raise
    return found.result()


def load_all(wanted: Iterable[tuple[Wanted, torch.device]]) -> None:
    """Has kernels loaded on their devices, compiled where they were not yet, as many at once as there are cores: beside more of
    them the thread that reads weights meanwhile would hardly have its turn."""
    from aerogel.eval.machine import usable_cores

    def load(one: tuple[Wanted, torch.device]) -> None:
        torch.cuda.set_device(one[1])  # a new thread has no context yet
        function(*one[0], one[1])

    with ThreadPoolExecutor(min(MOST_COMPILERS, usable_cores())) as pool:
        for _ in pool.map(load, wanted):
            pass


def compile_ahead(wanted: Iterable[tuple[str, nvrtc.Defines]], capability: nvrtc.Capability, workers: int = 8) -> None:
    """Compiles several kernels at once into the cache on disk; the compiler runs outside Python's lock."""
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(lambda item: code(item[0], item[1], capability), wanted):
            pass
