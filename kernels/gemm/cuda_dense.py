"""Many tokens on CUDA by way of a dense weight: decode some rows into a buffer, multiply them with cuBLAS, repeat.

The buffer is kept small enough to stay in the GPU's L2 cache between the two, so what is decoded is rarely written to
memory; the matmul then runs at the speed of a dense one, plus reading the codes once. Runs everything.

Shape legend: M tokens, N out features, K in features.
"""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.kernels.cuda.sources import Wanted
from aerogel.kernels.gemm.cuda import Runner
from aerogel.kernels.gemm.cuda_decoder import decoder_defines, table_bytes
from aerogel.kernels.gemm.cuda_weight import TileWeight

SOURCE = "dequantize.cu"
WARPS = 8
BUFFER_BYTES = 24 << 20
"""Dense rows decoded at a time: half of an H100's L2."""


class Arguments(ctypes.Structure):
    """`Arguments` of dequantize.cu, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "zero", "table", "pick", "factor", "dense")),
        *((name, ctypes.c_void_p) for name in ("outlier_start", "outlier")),
        *((name, ctypes.c_int) for name in ("rows", "K", "first_tile", "k_tiles", "groups", "tables")),
    ]


def kernel_of(weight: TileWeight, dtype: torch.dtype) -> Wanted:
    """The kernel that decodes a weight."""
    return Wanted(SOURCE, "dequantize", decoder_defines(weight, dtype))


class Dequantizer:
    """Decodes rows of one weight. dtype: bfloat16 or float16, what the dense rows are rounded to.

    It knows the weight by its addresses and keeps none of its memory alive but the table's, whose converted copy it uses.
    """

    def __init__(self, weight: TileWeight, dtype: torch.dtype) -> None:
        from aerogel.kernels.cuda.sources import function

        device = weight.codes.device
        self._function = function(*kernel_of(weight, dtype), device)
        self._device, self._k_tiles = device.index, weight.codes.shape[1]
        self._original = weight.table
        self._table = table = None if weight.table is None else weight.table.to(dtype)
        self._shared = WARPS * 16 * 272 + table_bytes(weight, 1)
        self._facts: dict[str, Any] = {
            "codes": weight.codes.data_ptr(),
            "scale": weight.scale.data_ptr(),
            "zero": None if weight.zero is None else weight.zero.data_ptr(),
            "table": None if table is None else table.data_ptr(),
            "pick": None if weight.pick is None else weight.pick.data_ptr(),
            "factor": None if weight.factor is None else weight.factor.data_ptr(),
            "outlier_start": None if weight.outliers is None else weight.outliers.start_T1.data_ptr(),
            "outlier": None if weight.outliers is None else weight.outliers.by_sheet_E.data_ptr(),
            "K": weight.K,
            "k_tiles": self._k_tiles,
            "groups": weight.groups,
            "tables": 0 if table is None else table.shape[0],
        }

    def __call__(self, first: int, dense: Tensor) -> None:
        """Rows first .. of W into `dense` [rows, K], contiguous; `first` is a multiple of 16."""
        from aerogel.kernels.cuda.launch import Launch

        rows = dense.shape[0]
        arguments = Arguments(dense=dense.data_ptr(), rows=rows, first_tile=first // 16, **self._facts)
        blocks = -(-rows // 16) * -(-self._k_tiles // WARPS)
        launch = Launch(self._function, arguments, grid=(blocks,), block=WARPS * 32, shared_bytes=self._shared)
        launch(torch._C._cuda_getCurrentRawStream(self._device))


def dequantize(weight: TileWeight, dtype: torch.dtype) -> Tensor:
    """The whole dense weight [N, K] in `dtype`, on the weight's device."""
    dense_NK = torch.empty(weight.N, weight.K, dtype=dtype, device=weight.codes.device)
    if dense_NK.numel():
        with torch.cuda.device(weight.codes.device):
            Dequantizer(weight, dtype)(0, dense_NK)
    return dense_NK


class Dense:
    """Decode and multiply with cuBLAS, a part of the rows at a time."""

    name: ClassVar[str] = "dense"

    @staticmethod
    def refuses(weight: TileWeight, M: int, dtype: torch.dtype, capability: tuple[int, int]) -> str | None:
        """Nothing."""
        return None

    @staticmethod
    def kernels(weight: TileWeight, M: int, dtype: torch.dtype, device: torch.device) -> list[Wanted]:
        """See `Implementation.kernels`."""
        return [kernel_of(weight, dtype)]

    @staticmethod
    def plan(weight: TileWeight, M: int, dtype: torch.dtype) -> Runner:
        """See `Implementation.plan`."""
        decode = Dequantizer(weight, dtype)
        N, K = weight.N, weight.K
        step = max(16, BUFFER_BYTES // (2 * max(K, 1)) // 16 * 16)

        def run(x_MK: Tensor, bias_N: Tensor | None, y_MN: Tensor) -> None:
            buffer = torch.empty(min(step, N), K, dtype=dtype, device=x_MK.device)
            for first in range(0, N, step):
                rows = buffer[: min(step, N - first)]
                decode(first, rows)
                part = y_MN[:, first : first + rows.shape[0]]
                if bias_N is None:
                    torch.mm(x_MK, rows.T, out=part) if part.is_contiguous() else part.copy_(x_MK @ rows.T)
                else:
                    part.copy_(torch.addmm(bias_N[first : first + rows.shape[0]].to(dtype), x_MK, rows.T))

        return run
