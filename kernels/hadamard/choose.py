"""Which code rotates the inputs of a weight that is stored in a rotated basis, behind an operator that torch.compile and traced
steps see whole.

    y = x D H        in float32, then in x's dtype (`quantize/hadamard.py`)

On a CPU the compiled transform, on an NVIDIA GPU a small kernel, elsewhere torch's operators: five launches, of which one is a
product with H: 10.5 to 13 us before a matmul of 4 to 32 on an H100, where the kernel takes 0.9 to 1.9.

Shape legend: M tokens, K in features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.kernels.hadamard import cpu, cuda
from aerogel.kernels.native.library import missing
from aerogel.quantize.hadamard import hadamard

_library = torch.library.Library("aerogel", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("hadamard(Tensor x_MK, Tensor signs_K, int block) -> Tensor")  # type: ignore[no-untyped-call]


def turned(x_MK: Tensor, signs_K: Tensor, block: int) -> Tensor:
    """x D H in x's dtype, in new memory.

    Args:
        x_MK: contiguous.
        signs_K: int8 [K] of -1 and 1, the diagonal of D.
        block: a power of two that divides K.
    """
    found: Tensor = torch.ops.aerogel.hadamard(x_MK, signs_K, block)
    return found


def _reference(x_MK: Tensor, signs_K: Tensor, block: int) -> Tensor:
    return hadamard(x_MK.float(), signs_K, block).to(x_MK.dtype, copy=True)


def _cpu(x_MK: Tensor, signs_K: Tensor, block: int) -> Tensor:
    if missing() is not None or not cpu.takes(x_MK, signs_K):
        return _reference(x_MK, signs_K, block)
    return cpu.turned(x_MK, signs_K, block)


def _cuda(x_MK: Tensor, signs_K: Tensor, block: int) -> Tensor:
    if not cuda.takes(x_MK, signs_K, block):
        return _reference(x_MK, signs_K, block)
    return cuda.turned(x_MK, signs_K, block)


def _fake(x_MK: Tensor, signs_K: Tensor, block: int) -> Tensor:
    return torch.empty_like(x_MK)


_library.impl("hadamard", _cpu, "CPU")  # type: ignore[no-untyped-call]
_library.impl("hadamard", _cuda, "CUDA")  # type: ignore[no-untyped-call]
_library.impl("hadamard", _reference, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("aerogel::hadamard", _fake, lib=_library)
