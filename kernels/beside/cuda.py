"""Sparse outliers on an NVIDIA GPU, on top of a product: the host's side of `cuda/beside.cu`.

    out_MN = y_MN + x_MK S^T        S [N, K] sparse, by rows; sums in float32

For matmuls that cannot add them themselves. Shape legend: M tokens, N out features, K in features, E outliers.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aerogel.kernels import gpu_here
from aerogel.kernels.beside.ref import Beside

if TYPE_CHECKING:
    from aerogel.kernels.cuda.launch import Launch

SOURCE, KERNEL = "beside.cu", "add_outliers"
WARPS, ROWS = 8, 32
LOOKED_UP = (1, 2, 4)
"""Numbers of tokens whose inputs are looked up one by one."""
PAIRS = (4, 8, 16, 32)
"""Lanes that have two tokens each, with more tokens."""
HALVES = (torch.bfloat16, torch.float16)


class Arguments(ctypes.Structure):
    """`Arguments` of beside.cu, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "start", "column", "value", "y", "out")),
        *((name, ctypes.c_int) for name in ("M", "N", "K", "x_stride")),
    ]


def takes(y_MN: Tensor, x_MK: Tensor, beside: Beside) -> bool:
    """Whether the kernel adds these outliers: 16-bit numbers side by side, on a GPU that it is compiled for."""
    if beside.start_N1 is None or beside.column_E is None or beside.value_E is None or 0 in (*y_MN.shape, *x_MK.shape):
        return False
    halves = y_MN.dtype == x_MK.dtype and x_MK.dtype in HALVES and beside.value_E.dtype in HALVES
    return halves and x_MK.is_contiguous() and y_MN.is_contiguous() and _compiles()


@functools.cache
def _compiles() -> bool:
    return gpu_here.nvidia_missing() is None


def macros(M: int, dtype: torch.dtype, value: torch.dtype, column: torch.dtype) -> dict[str, int]:
    """Those that specialise the source for M tokens; dtype: of activations, value and column: of outliers."""
    tokens = next((most for most in LOOKED_UP if most >= M), 0)
    pairs = 0 if tokens else next((lanes for lanes in PAIRS if 2 * lanes >= M), PAIRS[-1])
    return {
        "TOKENS": tokens or 2 * pairs,
        "PAIRS": pairs,
        "FP16": int(dtype == torch.float16),
        "VALUE_FP16": int(value == torch.float16),
        "WIDE": int(column == torch.int32),
    }


def add(y_MN: Tensor, x_MK: Tensor, beside: Beside) -> Tensor:
    """The sum, a new tensor of y's dtype, of outliers that `takes` takes."""
    start_N1, column_E, value_E = beside.start_N1, beside.column_E, beside.value_E
    if start_N1 is None or column_E is None or value_E is None:
        raise ValueError("there are no outliers to add; ask `takes` first")
    M, out = len(x_MK), torch.empty_like(y_MN)
    x = x_MK if LOOKED_UP[-1] >= M else torch.nn.functional.pad(x_MK.T, (0, M % 2)).contiguous()
    with torch.cuda.device(x_MK.device), _LOCK:
        launch = _launch(M, y_MN.shape[1], x_MK.shape[1], x_MK.dtype, value_E.dtype, column_E.dtype, x_MK.device)
        arguments: Any = launch.arguments
        arguments.x, arguments.y, arguments.out = x.data_ptr(), y_MN.data_ptr(), out.data_ptr()
        arguments.start, arguments.column, arguments.value = start_N1.data_ptr(), column_E.data_ptr(), value_E.data_ptr()
        launch(torch._C._cuda_getCurrentRawStream(x_MK.get_device()))
    return out


_LOCK = threading.Lock()
"""Held from filling a launch's arguments until it is queued."""


@functools.lru_cache(maxsize=4096)
def _launch(
    M: int, N: int, K: int, dtype: torch.dtype, value: torch.dtype, column: torch.dtype, device: torch.device
) -> Launch:
    """The kernel for M tokens; its addresses are filled in by each call."""
    from aerogel.kernels.cuda.launch import Launch
    from aerogel.kernels.cuda.sources import function

    found = macros(M, dtype, value, column)
    return Launch(
        function(SOURCE, KERNEL, found, device),
        Arguments(M=M, N=N, K=K, x_stride=M + M % 2),
        grid=(-(-N // (ROWS if found["PAIRS"] else WARPS)), -(-M // found["TOKENS"])),
        block=32 * WARPS,
        early=torch.cuda.get_device_capability(device) >= (9, 0),
    )
