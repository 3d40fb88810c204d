"""The rotation of inputs on an NVIDIA GPU: the host's side of `cuda/hadamard.cu`.

Shape legend: M tokens, K in features.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aerogel.kernels import gpu_here

if TYPE_CHECKING:
    from aerogel.kernels.cuda.launch import Launch

SOURCE, KERNEL = "hadamard.cu", "turn"
PIECE = 8
"""Inputs of a thread."""
FEWEST_THREADS = 256
"""With 64 a rotation of 2048 tokens takes two and a half times as long: as many more blocks begin."""
MOST_TOKENS = 1 << 30
HALVES = (torch.bfloat16, torch.float16)


class Arguments(ctypes.Structure):
    """`Arguments` of hadamard.cu, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "signs", "y")),
        ("pieces", ctypes.c_int),
        ("unit", ctypes.c_float),
    ]


def takes(x_MK: Tensor, signs_K: Tensor, block: int) -> bool:
    """Whether the kernel rotates these: 16-bit numbers side by side where 16 bytes can be read at once, signs as bytes, runs of
    8 to 8192, on a GPU that it is compiled for."""
    K = x_MK.shape[-1]
    alike = x_MK.dtype in HALVES and signs_K.dtype == torch.int8 and signs_K.shape == (K,) and signs_K.device == x_MK.device
    runs = block in (PIECE << power for power in range(11)) and K % block == 0 and 0 < x_MK.numel() // K <= MOST_TOKENS
    whole = x_MK.is_contiguous() and signs_K.is_contiguous()
    return alike and runs and whole and x_MK.data_ptr() % 16 == 0 and signs_K.data_ptr() % 8 == 0 and _compiles()


@functools.cache
def _compiles() -> bool:
    return gpu_here.nvidia_missing() is None


def macros(block: int, dtype: torch.dtype) -> dict[str, int]:
    """Those that specialise the source for runs of `block` inputs of `dtype`."""
    return {"RUN": block, "THREADS": max(FEWEST_THREADS, block // PIECE), "FP16": int(dtype == torch.float16)}


def turned(x_MK: Tensor, signs_K: Tensor, block: int) -> Tensor:
    """x D H, a new tensor, for what `takes` takes."""
    y_MK, K = torch.empty_like(x_MK), x_MK.shape[-1]
    with torch.cuda.device(x_MK.device), _LOCK:
        launch = _launch(x_MK.numel() // K, K, block, x_MK.dtype, x_MK.device)
        arguments: Any = launch.arguments
        arguments.x, arguments.signs, arguments.y = x_MK.data_ptr(), signs_K.data_ptr(), y_MK.data_ptr()
        launch(torch._C._cuda_getCurrentRawStream(x_MK.get_device()))
    return y_MK


_LOCK = threading.Lock()
"""Held from filling a launch's arguments until it is queued."""


@functools.lru_cache(maxsize=4096)
def _launch(M: int, K: int, block: int, dtype: torch.dtype, device: torch.device) -> Launch:
    """The kernel for M tokens; its addresses are filled in by each call."""
    from aerogel.kernels.cuda.launch import Launch
    from aerogel.kernels.cuda.sources import function

    found = macros(block, dtype)
    return Launch(
        function(SOURCE, KERNEL, found, device),
        Arguments(pieces=K // PIECE, unit=block**-0.5),
        grid=(M, -(-K // (PIECE * found["THREADS"]))),
        block=found["THREADS"],
        early=torch.cuda.get_device_capability(device) >= (9, 0),
    )
