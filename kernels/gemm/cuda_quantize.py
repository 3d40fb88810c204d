"""Activations rounded to 8 bits on CUDA, a scale for each token: the host's side of `quantize.cu`.

Shape legend: M tokens, K in features.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from aerogel.kernels.cuda.launch import Launch

SOURCE, KERNEL, THREADS = "quantize.cu", "quantize_tokens", 256
INT8, E4M3, ROUNDED = 0, 1, 2
"""What comes out: int8 codes, e4m3 codes, or the rounded numbers in the type they came in."""


class Arguments(ctypes.Structure):
    """`Arguments` of quantize.cu, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "codes", "scale", "fixed")),
        *((name, ctypes.c_int) for name in ("K", "x_stride", "columns")),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantizer:
    """Rounds x [M, K] bf16 or fp16 of one type on one device.

    output: INT8, E4M3 or ROUNDED. permuted: int8 codes in the order that the integer matmul wants, inside each 16 columns.
    columns: of the result, at least K, a multiple of 16; those beyond K are zeros.
    """

    dtype: torch.dtype
    device: torch.device
    output: int
    columns: int
    permuted: bool = False

    def __call__(self, x_MK: Tensor, fixed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Codes [M, columns] and float32 scales [M]: x ~ code * scale. `fixed`: a float32 scale [1] for all tokens.

        A token with an infinity or a NaN gets a scale that is not finite, and so does all that is computed with it.
        """
        M, K = x_MK.shape
        if K % 8 or x_MK.data_ptr() % 16 or not x_MK.is_contiguous():
            x_MK = torch.nn.functional.pad(x_MK, (0, -K % 8)).contiguous()
            x_MK = x_MK.clone() if x_MK.data_ptr() % 16 else x_MK
        kind = (torch.int8, torch.float8_e4m3fn, x_MK.dtype)[self.output]
        codes = torch.empty(M, self.columns, dtype=kind, device=x_MK.device)
        scale = torch.empty(M, dtype=torch.float32, device=x_MK.device)
        launch = _launch(self, M)
        with _LOCK:
            arguments: Any = launch.arguments
            arguments.x, arguments.codes, arguments.scale = x_MK.data_ptr(), codes.data_ptr(), scale.data_ptr()
            arguments.fixed = None if fixed is None else fixed.data_ptr()
            arguments.K, arguments.x_stride = K, x_MK.shape[1]
            launch(torch._C._cuda_getCurrentRawStream(self.device.index))
        return codes, scale


_LOCK = threading.Lock()
"""Held from filling a launch's arguments until it is queued."""


@functools.lru_cache(maxsize=1024)
def _launch(quantizer: Quantizer, M: int) -> Launch:
    """The kernel for M tokens; its addresses are filled in by each call."""
    from aerogel.kernels.cuda.launch import Launch
    from aerogel.kernels.cuda.sources import function

    fp16 = quantizer.dtype == torch.float16
    macros = {"OUTPUT": quantizer.output, "FP16": int(fp16), "PERMUTED": int(quantizer.permuted)}
    kernel = function(SOURCE, KERNEL, macros, quantizer.device)
    early = torch.cuda.get_device_capability(quantizer.device) >= (9, 0)
    return Launch(kernel, Arguments(columns=quantizer.columns), grid=(M,), block=THREADS, early=early)
