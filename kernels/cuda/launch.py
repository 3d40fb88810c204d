"""Compiled kernels on a device: load the machine code, set what a function may use, launch it.

The driver is called through ctypes. What does not change between launches (grid, shared memory, attributes, the argument
block) is built once, so that a launch is one call of `cuLaunchKernelEx` on the stream that torch works on; torch's CUDA
graphs record it like any other.

Programmatic dependent launch lets a kernel begin while its predecessor on the stream still runs: it may do whatever does
not depend on the predecessor (here: fetch weights) and must wait, with `griddepcontrol.wait`, before it touches anything
that another kernel writes or reads. It hides the gap between launches, which for a layer of 5 us is a fifth of the time.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch

from aerogel.errors import RunFailed

CLUSTER_DIMENSION = 4
PROGRAMMATIC_SERIALIZATION = 6
MAX_DYNAMIC_SHARED = 8
ATTRIBUTES = {"max_threads": 0, "static_shared": 1, "local_bytes": 3, "registers": 4}
"""The driver's numbers for what is asked of a launch or a function."""


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    ]


@functools.cache
def driver() -> ctypes.CDLL:
    """The CUDA driver. Raises `ImportError` where there is none."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise ImportError("the CUDA driver (libcuda.so.1) was not found; install NVIDIA's driver")


def check(code: int, what: str) -> None:
    """Raises `RunFailed` with the driver's words when `code` is an error."""
    if code:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(code, ctypes.byref(text))
        said = text.value.decode() if text.value else f"error {code}"
        raise RunFailed(f"{what} failed: {said}")


class Function:
    """One kernel of a cubin, loaded on the current device.

    Args:
        code: the cubin.
        name: the kernel's name (declared `extern "C"`).
        shared_bytes: the most dynamic shared memory it will be launched with.

    Raises:
        RunFailed: the driver does not take the code, or the device has less shared memory.
    """

    def __init__(self, code: bytes, name: str, shared_bytes: int = 0) -> None:
        torch.cuda.current_stream()  # makes torch's context current: the driver has none of its own
        self.name = name
        self._module, self.handle = ctypes.c_void_p(), ctypes.c_void_p()
        check(driver().cuModuleLoadData(ctypes.byref(self._module), code), f"loading kernel {name}")
        check(driver().cuModuleGetFunction(ctypes.byref(self.handle), self._module, name.encode()), f"finding kernel {name}")
        self._shared = 0
        self.allow_shared(shared_bytes)

    def allow_shared(self, size: int) -> None:
        """Raises the limit of dynamic shared memory to `size` bytes where it is lower."""
        if size > max(self._shared, 48 << 10):
            code = driver().cuFuncSetAttribute(self.handle, MAX_DYNAMIC_SHARED, size)
            check(code, f"giving kernel {self.name} {size} bytes of shared memory")
            self._shared = size

    def attribute(self, what: str) -> int:
        """One of `ATTRIBUTES` of this kernel as compiled: registers and local (spilled) bytes per thread, ..."""
        found = ctypes.c_int()
        code = driver().cuFuncGetAttribute(ctypes.byref(found), ATTRIBUTES[what], self.handle)
        check(code, f"asking for {what} of {self.name}")
        return found.value


class Launch:
    """A kernel with everything decided but the stream.

    Args:
        function: the kernel.
        arguments: a ctypes structure, the kernel's only parameter; its fields may be changed between launches.
        grid: blocks, up to three dimensions. block: threads. shared_bytes: dynamic shared memory.
        early: begin before the predecessor on the stream has ended (compute capability 9.0 and newer); the kernel must
            call griddepcontrol.wait itself.
        cluster: blocks along x that share a cluster; 1 for none.
    """

    def __init__(
        self,
        function: Function,
        arguments: ctypes.Structure,
        *,
        grid: Sequence[int],
        block: int,
        shared_bytes: int = 0,
        early: bool = False,
        cluster: int = 1,
    ) -> None:
        function.allow_shared(shared_bytes)
        self._function, self.arguments = function, arguments
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        wanted: list[tuple[int, list[int]]] = []
        if cluster > 1:
            wanted.append((CLUSTER_DIMENSION, [cluster, 1, 1]))
        if early:
            wanted.append((PROGRAMMATIC_SERIALIZATION, [1]))
        self._attributes = (_Attribute * max(len(wanted), 1))()
        for entry, (identity, values) in zip(self._attributes, wanted, strict=False):
            entry.id = identity
            for place, value in enumerate(values):
                entry.value[place] = value
        self._config = _Config(
            (ctypes.c_uint * 3)(*grid, *[1] * (3 - len(grid))),
            (ctypes.c_uint * 3)(block, 1, 1),
            shared_bytes,
            None,
            ctypes.addressof(self._attributes),
            len(wanted),
        )
        self._config_pointer = ctypes.byref(self._config)
        self._call: Any = driver().cuLaunchKernelEx

    def __call__(self, stream: int) -> None:
        """Queues the kernel on a CUDA stream (torch's `Stream.cuda_stream`). Raises `RunFailed` with the driver's reason."""
        self._config.stream = stream
        code = self._call(self._config_pointer, self._function.handle, self._pointers, None)
        if code:
            config = self._config
            check(
                code,
                f"launching {self._function.name} with grid {list(config.grid)}, {config.block[0]} threads and"
                f" {config.shared_bytes} bytes of shared memory",
            )
