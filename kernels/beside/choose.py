"""Which code adds what stands beside a packed weight, behind an operator that torch.compile and traced steps see whole."""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.kernels.beside import cpu, ref
from aerogel.kernels.beside.ref import Beside
from aerogel.kernels.native.library import missing

_TENSORS = "Tensor? start_N1, Tensor? column_E, Tensor? value_E, Tensor? index_C, Tensor? kept_NC"
_library = torch.library.Library("aerogel", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(f"add_beside(Tensor? y_MN, Tensor x_MK, {_TENSORS}) -> Tensor")  # type: ignore[no-untyped-call]
_library.define(f"quiet(Tensor x_MK, {_TENSORS}) -> Tensor")  # type: ignore[no-untyped-call]


def add(y_MN: Tensor | None, x_MK: Tensor, beside: Beside) -> Tensor:
    """`ref.add` as an operator; no y means zeros."""
    found: Tensor = torch.ops.aerogel.add_beside(y_MN, x_MK, *beside.all())
    return found


def quiet(x_MK: Tensor, beside: Beside) -> Tensor:
    """x with zeros at the inputs of kept columns, a new tensor, as an operator."""
    found: Tensor = torch.ops.aerogel.quiet(x_MK, *beside.all())
    return found


def _zeros(y_MN: Tensor | None, x_MK: Tensor, beside: Beside) -> Tensor:
    return x_MK.new_zeros(len(x_MK), beside.rows) if y_MN is None else y_MN


def _add_cpu(y_MN: Tensor | None, x_MK: Tensor, *tensors: Tensor | None) -> Tensor:
    beside = Beside(*tensors)
    y_MN = _zeros(y_MN, x_MK, beside)
    alike = y_MN.dtype == x_MK.dtype and x_MK.dtype in cpu.TYPES and x_MK.is_contiguous() and y_MN.is_contiguous()
    if missing() is not None or not alike or 0 in (*x_MK.shape, y_MN.shape[1]) or not cpu.fits(y_MN.shape[1], beside):
        return ref.add(y_MN, x_MK, beside)
    return cpu.add(y_MN, x_MK, beside)


def _add_cuda(y_MN: Tensor | None, x_MK: Tensor, *tensors: Tensor | None) -> Tensor:
    from aerogel.kernels.beside import cuda

    beside = Beside(*tensors)
    if not cuda.fits(x_MK, beside) or (y_MN is not None and y_MN.dtype != x_MK.dtype):
        return ref.add(_zeros(y_MN, x_MK, beside), x_MK, beside)
    return cuda.add(y_MN, x_MK, beside)


def _quiet_cpu(x_MK: Tensor, *tensors: Tensor | None) -> Tensor:
    return ref.quiet(x_MK, Beside(*tensors))


def _quiet_cuda(x_MK: Tensor, *tensors: Tensor | None) -> Tensor:
    from aerogel.kernels.beside import cuda

    beside = Beside(*tensors)
    return cuda.quiet(x_MK, beside) if cuda.fits(x_MK, beside) else ref.quiet(x_MK, beside)


def _add_fake(y_MN: Tensor | None, x_MK: Tensor, *tensors: Tensor | None) -> Tensor:
    return x_MK.new_empty(len(x_MK), Beside(*tensors).rows)


def _quiet_fake(x_MK: Tensor, *tensors: Tensor | None) -> Tensor:
    return torch.empty_like(x_MK)


_library.impl("add_beside", _add_cpu, "CPU")  # type: ignore[no-untyped-call]
_library.impl("add_beside", _add_cuda, "CUDA")  # type: ignore[no-untyped-call]
_library.impl("quiet", _quiet_cpu, "CPU")  # type: ignore[no-untyped-call]
_library.impl("quiet", _quiet_cuda, "CUDA")  # type: ignore[no-untyped-call]
torch.library.register_fake("aerogel::add_beside", _add_fake, lib=_library)
torch.library.register_fake("aerogel::quiet", _quiet_fake, lib=_library)
