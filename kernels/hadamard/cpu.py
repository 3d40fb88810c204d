"""The rotation of inputs as compiled CPU code: additions in registers, kernels/native/hadamard.h.

As torch's operators it is a cast, two products, and a cast back, 70 microseconds before a product of 30; here 576 inputs take a
fraction of one.

Shape legend: M tokens, K in features.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from aerogel.kernels.native import library


class Hadamard(ctypes.Structure):
    """One rotation; kernels/native/step_structs.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "signs", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "size", "block")),
        *((name, ctypes.c_int32) for name in ("type", "threads")),
    ]


def takes(x_MK: Tensor, signs_K: Tensor) -> bool:
    """Whether the compiled code rotates these: a type that it knows, contiguous, in main memory, a sign for each input."""
    signs = signs_K.dtype == torch.int8 and signs_K.shape == x_MK.shape[-1:] and len(signs_K) > 0
    whole = x_MK.is_contiguous() and signs_K.is_contiguous()
    return signs and whole and x_MK.dtype in library.TYPES and x_MK.device.type == signs_K.device.type == "cpu"


def arguments(x: Tensor, signs_K: Tensor, block: int, y: Tensor) -> Hadamard:
    """The struct of y = x D H for tensors that `takes` takes, y like x: valid while all of them live."""
    K = len(signs_K)
    places = x.data_ptr(), signs_K.data_ptr(), y.data_ptr()
    return Hadamard(*places, x.numel() // K, K, block, library.TYPES[x.dtype], library.threads())


def turned(x_MK: Tensor, signs_K: Tensor, block: int) -> Tensor:
    """x D H in x's dtype, in new memory. Raises `BadInput` for a block that is no power of two or does not divide K."""
    y_MK = torch.empty_like(x_MK)
    status = library.library().aerogel_native_hadamard(ctypes.byref(arguments(x_MK, signs_K, block, y_MK)))
    library.check(status, f"a Hadamard transform in blocks of {block}")
    return y_MK
