"""What stands beside a packed weight on NVIDIA GPUs: the host's side of kernels/cuda/beside.cu.

One small launch for a single token, two for several; each begins before its predecessor is done, with weights in registers.

Shape legend: M tokens, N out features, K in features, C kept columns, E outliers.
"""

from __future__ import annotations

import ctypes
import threading
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from aerogel.kernels.beside.ref import Beside

SOURCE, BLOCK_ROWS, THREADS, TURN_THREADS = "beside.cu", 32, 256, 128
MOST_SLICES = 65535
COLUMN_TOKENS = 16
TYPES = (torch.bfloat16, torch.float16)
MOST_PLANS = 1 << 12


class Arguments(ctypes.Structure):
    """`Arguments` of beside.cu, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("start", "column", "value", "index", "kept_value", "x", "turned", "y", "out")),
        *((name, ctypes.c_int) for name in ("M", "N", "K", "kept")),
    ]


def fits(x_MK: Tensor, beside: Beside) -> bool:
    """Whether the kernels take these tensors: inputs and weights of 16 bits, all contiguous."""
    given = [tensor for tensor in beside.all() if tensor is not None]
    weights = [tensor.dtype in TYPES for tensor in (beside.value_E, beside.kept_NC) if tensor is not None]
    some = x_MK.dtype in TYPES and 0 < len(x_MK) <= 16 * MOST_SLICES and x_MK.shape[1] > 0
    return some and all(weights) and all(tensor.is_contiguous() for tensor in (*given, x_MK))


def tokens_of(M: int) -> int:
    """How many tokens a block takes where there are M."""
    return next((most for most in (1, 4, 8) if most >= M), 16)


def defines(x: torch.dtype, beside: Beside, M: int) -> dict[str, int]:
    """The macros that specialise the source."""
    fp16 = {"VALUE_FP16": beside.value_E, "KEPT_FP16": beside.kept_NC}
    wide = beside.column_E is not None and beside.column_E.dtype == torch.int32
    kinds = {name: int(tensor is not None and tensor.dtype == torch.float16) for name, tensor in fp16.items()}
    return {"TOKENS": tokens_of(M), "FP16": int(x == torch.float16), "WIDE": int(wide), **kinds}


class Plan:
    """One weight's tensors and number of tokens, compiled and ready. The first call does not begin early: the kernel before it
    may have written the weight."""

    def __init__(self, beside: Beside, M: int, N: int, K: int, dtype: torch.dtype, device: torch.device) -> None:
        from aerogel.kernels.cuda.launch import Launch
        from aerogel.kernels.cuda.sources import function

        macros, early = defines(dtype, beside, M), torch.cuda.get_device_capability(device) >= (9, 0)
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in beside.all()]
        kept = 0 if beside.index_C is None else beside.index_C.numel()
        self._arguments: Any = Arguments(*addresses, M=M, N=N, K=K, kept=kept)
        tokens = macros["TOKENS"]
        slices = -(-M // tokens)
        self._turned, self._device, self._lock = slices * tokens * K if M > 1 else 0, device.index, threading.Lock()

        def launch(name: str, grid: tuple[int, ...], block: int, early: bool = early) -> Launch:
            return Launch(function(SOURCE, name, macros, device), self._arguments, grid=grid, block=block, early=early)

        blocks = (-(-N // BLOCK_ROWS), slices)
        self._first: Launch | None = launch("add_beside", blocks, THREADS, False)
        self._add = launch("add_beside", blocks, THREADS)
        self._turn = launch("turn_round", (-(-K // TURN_THREADS), slices), TURN_THREADS) if M > 1 else None
        self._quiet = launch("quiet", (M,), THREADS)

    def add(self, y_MN: Tensor | None, x_MK: Tensor, out_MN: Tensor) -> Tensor:
        """Fills `out_MN`; no y means zeros."""
        turned = torch.empty(self._turned, dtype=x_MK.dtype, device=x_MK.device)
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        with self._lock:
            arguments = self._arguments
            arguments.x, arguments.turned = x_MK.data_ptr(), turned.data_ptr()
            arguments.y, arguments.out = None if y_MN is None else y_MN.data_ptr(), out_MN.data_ptr()
            if self._turn is not None:
                self._turn(stream)
            launch, self._first = self._first or self._add, None
            launch(stream)
        return out_MN

    def quiet(self, x_MK: Tensor) -> Tensor:
        """x with zeros at the inputs of kept columns, a new tensor."""
        out_MK = torch.empty_like(x_MK)
        with self._lock:
            self._arguments.x, self._arguments.out = x_MK.data_ptr(), out_MK.data_ptr()
            self._quiet(torch._C._cuda_getCurrentRawStream(self._device))
        return out_MK


_plans: dict[tuple[object, ...], Plan] = {}


def plan_of(x_MK: Tensor, beside: Beside) -> Plan:
    """For tensors that fit. It is found by the addresses of the weight's tensors, so it is never outdated."""
    (M, K), N = x_MK.shape, beside.rows
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in beside.all()]
    sizes = [0 if tensor is None else tensor.numel() for tensor in (beside.value_E, beside.index_C)]
    kinds = [None if tensor is None else tensor.dtype for tensor in beside.all()]
    key = (*addresses, *sizes, *kinds, M, K, N, x_MK.dtype, x_MK.get_device())
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        plan = _plans[key] = Plan(beside, M, N, K, x_MK.dtype, x_MK.device)
    return plan


def add(y_MN: Tensor | None, x_MK: Tensor, beside: Beside) -> Tensor:
    """As `ref.add`, for tensors that fit; no y means zeros. Columns of many tokens are a product for the library."""
    with torch.cuda.device(x_MK.device):
        if y_MN is not None and len(x_MK) > COLUMN_TOKENS and beside.index_C is not None and beside.kept_NC is not None:
            y_MN = torch.addmm(y_MN, x_MK[:, beside.index_C], beside.kept_NC.to(x_MK.dtype).T)
            beside = replace(beside, index_C=None, kept_NC=None)
            if beside.start_N1 is None:
                return y_MN
        y_MN = None if y_MN is None else y_MN.contiguous()
        out_MN = x_MK.new_empty(len(x_MK), beside.rows)
        return plan_of(x_MK, beside).add(y_MN, x_MK, out_MN)


def quiet(x_MK: Tensor, beside: Beside) -> Tensor:
    """As `ref.quiet`, for tensors that fit."""
    with torch.cuda.device(x_MK.device):
        return plan_of(x_MK, beside).quiet(x_MK)
