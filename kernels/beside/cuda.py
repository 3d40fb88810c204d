"""Sparse outliers on an NVIDIA GPU, on top of a product: the host's side of `cuda/beside.cu`.

    out_MN = y_MN + x_MK S^T        S [N, K] sparse, by rows; sums in float32

For matmuls that cannot add them themselves. Shape legend: M tokens, N out features, K in features, E outliers.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aerogel.kernels import gpu_here
from aerogel.kernels.beside.ref import Beside

if TYPE_CHECKING:
    from aerogel.kernels.cuda.launch import Function, Launch

SOURCE, KERNEL = "beside.cu", "add_outliers"
WARPS = 32
SLICES = ((4, 4), (4, 2), (4, 1), (2, 1), (1, 1))
"""(tokens of a lane, lanes): the tokens of a block."""
HALVES = (torch.bfloat16, torch.float16)


class Arguments(ctypes.Structure):
    """`Arguments` of beside.cu, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "start", "column", "value", "y", "out")),
        *((name, ctypes.c_int) for name in ("M", "N", "K")),
    ]


def takes(y_MN: Tensor, x_MK: Tensor, beside: Beside) -> bool:
    """Whether the kernel adds these outliers: 16-bit numbers side by side, on a GPU that it is compiled for and that has room
    for the inputs of a token."""
    if beside.start_N1 is None or beside.column_E is None or beside.value_E is None or 0 in (*y_MN.shape, *x_MK.shape):
        return False
    halves = y_MN.dtype == x_MK.dtype and x_MK.dtype in HALVES and beside.value_E.dtype in HALVES
    whole = halves and x_MK.is_contiguous() and y_MN.is_contiguous() and _compiles()
    return whole and holds(x_MK.shape[1], beside.value_E.dtype, torch.cuda.get_device_capability(x_MK.device))


def holds(K: int, value: torch.dtype, capability: tuple[int, int]) -> bool:
    """Whether the kernel has room for K inputs and takes outliers of this type."""
    return value in HALVES and slice_of(1, K, capability) is not None


@functools.cache
def _compiles() -> bool:
    return gpu_here.nvidia_missing() is None


def slice_of(M: int, K: int, capability: tuple[int, int]) -> tuple[int, int] | None:
    """The one of SLICES that takes M tokens with the fewest blocks; None where shared memory does not hold a token's inputs."""
    from aerogel.kernels.gemm.cuda_few import SHARED_LIMIT

    room = SHARED_LIMIT.get(capability[0], 99 << 10) // (2 * (K + 1))
    fitting = [found for found in SLICES if math.prod(found) <= room]
    return next((found for found in reversed(fitting) if math.prod(found) >= M), fitting[0] if fitting else None)


def rows_of(N: int, slices: int, multiprocessors: int) -> int:
    """Rows that a warp has at once: as many as leave work for about half of the warps of a device that so many slices share."""
    seats = max(1, multiprocessors // slices) * WARPS
    return next(rows for rows in (4, 2, 1) if rows == 1 or 4 * rows * seats <= 9 * N)


def macros(cut: tuple[int, int], rows: int, dtype: torch.dtype, value: torch.dtype, column: torch.dtype) -> dict[str, int]:
    """Those that specialise the source for one of SLICES; dtype: of activations, value and column: of outliers."""
    return {
        "PER": cut[0],
        "LANES": cut[1],
        "ROWS": rows,
        "WARPS": WARPS,
        "FP16": int(dtype == torch.float16),
        "VALUE_FP16": int(value == torch.float16),
        "WIDE": int(column == torch.int32),
    }


def add(y_MN: Tensor, x_MK: Tensor, beside: Beside) -> Tensor:
    """The sum, a new tensor of y's dtype, of outliers that `takes` takes."""
    start_N1, column_E, value_E = beside.start_N1, beside.column_E, beside.value_E
    if start_N1 is None or column_E is None or value_E is None:
        raise ValueError("there are no outliers to add; ask `takes` first")
    out_MN = torch.empty_like(y_MN)
    with torch.cuda.device(x_MK.device), _LOCK:
        addresses = start_N1.data_ptr(), column_E.data_ptr(), value_E.data_ptr()
        plan = _plan(*out_MN.shape, x_MK.shape[1], x_MK.dtype, value_E.dtype, column_E.dtype, x_MK.device, *addresses)
        arguments: Any = plan.arguments
        arguments.x, arguments.y, arguments.out = x_MK.data_ptr(), y_MN.data_ptr(), out_MN.data_ptr()
        plan(torch._C._cuda_getCurrentRawStream(x_MK.get_device()))
    return out_MN


_LOCK = threading.Lock()
"""Held from filling a launch's arguments until it is queued."""


class _Plan:
    """The kernel for some outliers and M tokens. Its first launch does not begin early: whatever wrote the outliers may be the
    kernel just before."""

    def __init__(self, function: Function, arguments: Arguments, options: dict[str, Any], early: bool) -> None:
        from aerogel.kernels.cuda.launch import Launch

        self.arguments = arguments
        self._first: Launch | None = Launch(function, arguments, **options)
        self._launch = Launch(function, arguments, early=early, **options)

    def __call__(self, stream: int) -> None:
        launch, self._first = self._first or self._launch, None
        launch(stream)


@functools.lru_cache(maxsize=1 << 14)
def _plan(
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    value: torch.dtype,
    column: torch.dtype,
    device: torch.device,
    start_N1: int,
    column_E: int,
    value_E: int,
) -> _Plan:
    """For outliers at these addresses; those of x and y are filled in by each call."""
    from aerogel.kernels.cuda.sources import function

    facts = torch.cuda.get_device_properties(device)
    cut = slice_of(M, K, (facts.major, facts.minor))
    if cut is None:
        raise ValueError(f"shared memory does not hold a token of {K} inputs; ask `takes` first")
    tokens = math.prod(cut)
    slices = -(-M // tokens)
    rows = rows_of(N, slices, facts.multi_processor_count)
    blocks = min(max(1, facts.multi_processor_count // slices), -(-N // (rows * WARPS)))
    options = {"grid": (blocks, slices), "block": 32 * WARPS, "shared_bytes": 2 * tokens * (K + 1)}
    return _Plan(
        function(SOURCE, KERNEL, macros(cut, rows, dtype, value, column), device),
        Arguments(start=start_N1, column=column_E, value=value_E, M=M, N=N, K=K),
        options,
        early=facts.major >= 9,
    )
