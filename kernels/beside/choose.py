"""Which code adds what stands beside a packed weight, behind an operator that torch.compile and traced steps see whole.

On a CPU the compiled loop, on an NVIDIA GPU a small kernel for outliers, elsewhere torch's operators. On a GPU the matmul adds
what it can itself (`Kernel.lay_beside`), and this is for the rest: the library's sparse product costs as much as seven matmuls
of 4 bits at one token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from aerogel.kernels.beside import cpu, cuda, ref
from aerogel.kernels.beside.ref import Beside
from aerogel.kernels.native.library import missing

_library = torch.library.Library("aerogel", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "add_beside(Tensor y_MN, Tensor x_MK, Tensor? start_N1, Tensor? column_E, Tensor? value_E, Tensor? index_C,"
    " Tensor? kept_NC) -> Tensor"
)


def add(y_MN: Tensor, x_MK: Tensor, beside: Beside) -> Tensor:
    """`ref.add` as an operator."""
    found: Tensor = torch.ops.aerogel.add_beside(y_MN, x_MK, *beside.all())
    return found


def _add_cpu(y_MN: Tensor, x_MK: Tensor, *tensors: Tensor | None) -> Tensor:
    beside = Beside(*tensors)
    alike = y_MN.dtype == x_MK.dtype and x_MK.dtype in cpu.TYPES and x_MK.is_contiguous() and y_MN.is_contiguous()
    if missing() is not None or not alike or 0 in (*x_MK.shape, y_MN.shape[1]) or not cpu.fits(y_MN.shape[1], beside):
        return ref.add(y_MN, x_MK, beside)
    return cpu.add(y_MN, x_MK, beside)


def _add_cuda(y_MN: Tensor, x_MK: Tensor, *tensors: Tensor | None) -> Tensor:
    beside = Beside(*tensors)
    if not cuda.takes(y_MN, x_MK, beside):
        return ref.add(y_MN, x_MK, beside)
    columns = replace(beside, start_N1=None, column_E=None, value_E=None)
    return cuda.add(ref.add(y_MN, x_MK, columns), x_MK, beside)


def _add_reference(y_MN: Tensor, x_MK: Tensor, *tensors: Tensor | None) -> Tensor:
    return ref.add(y_MN, x_MK, Beside(*tensors))


def _fake(y_MN: Tensor, x_MK: Tensor, *tensors: Tensor | None) -> Tensor:
    return torch.empty_like(y_MN)


_library.impl("add_beside", _add_cpu, "CPU")  # type: ignore[no-untyped-call]
_library.impl("add_beside", _add_cuda, "CUDA")  # type: ignore[no-untyped-call]
_library.impl("add_beside", _add_reference, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("aerogel::add_beside", _fake, lib=_library)
