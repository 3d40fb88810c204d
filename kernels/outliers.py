"""A packed linear with sparse outliers: the product of its kernel, and one small sparse product on top.

    y_MN = kernel(x_MK) + x_MK S^T        S [N, K] sparse, in float32

The sparse product is the library's (MKL on a CPU, cuSPARSE on CUDA) behind one operator, so that torch.compile and traced
steps see a single call. It reads 8 bytes per outlier, where 4-bit codes are half a byte per weight: at 1 % of the weights
0.08 bytes per weight beside 0.53, 15 % more to read. The outliers see the input as it is, also where the kernel rounds it.

Shape legend: M tokens, N out features, K in features, E outliers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from aerogel.kernels.linear import Linear
from aerogel.quantize.outliers import Outliers

CHILD = "weight_outliers"
"""Name of the child module that holds them."""

with warnings.catch_warnings():
    # torch says once per process that CSR tensors are in beta; said here, where nobody can act on it.
    warnings.simplefilter("ignore", UserWarning)
    torch.zeros(1, 1, device="cpu").to_sparse_csr()  # models are built with meta as the default device

_library = torch.library.Library("aerogel", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "add_outliers(Tensor y_MN, Tensor x_MK, Tensor start_N1, Tensor column_E, Tensor value_E) -> Tensor"
)


def add_outliers(y_MN: Tensor, x_MK: Tensor, start_N1: Tensor, column_E: Tensor, value_E: Tensor) -> Tensor:
    """y + x S^T in y's dtype. start and column int32, value float32; a new tensor."""
    size = (y_MN.shape[1], x_MK.shape[1])
    sparse_NK = torch.sparse_csr_tensor(start_N1, column_E, value_E, size, check_invariants=False)
    if len(x_MK) == 1:
        return (y_MN + (sparse_NK @ x_MK[0].float())).to(y_MN.dtype)
    return (y_MN + (sparse_NK @ x_MK.float().T).T).to(y_MN.dtype)


def _shape(y_MN: Tensor, x_MK: Tensor, start_N1: Tensor, column_E: Tensor, value_E: Tensor) -> Tensor:
    return torch.empty_like(y_MN)


for _key in ("CPU", "CUDA"):
    _library.impl("add_outliers", add_outliers, _key)  # type: ignore[no-untyped-call]
torch.library.register_fake("aerogel::add_outliers", _shape, lib=_library)


class Sidecar(nn.Module):
    """The stored outliers of one linear as buffers, and what the product reads of them, made when it is first needed."""

    start_N1: Tensor
    column_E: Tensor
    value_E: Tensor

    def __init__(self, outliers: Outliers) -> None:
        super().__init__()
        for name, tensor in vars(outliers).items():
            self.register_buffer(name, tensor)
        self._ready: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def outliers(self) -> Outliers:
        """The buffers."""
        return Outliers(start_N1=self.start_N1, column_E=self.column_E, value_E=self.value_E)

    def forward(self, y_MN: Tensor, x_MK: Tensor) -> Tensor:
        """y + x S^T."""
        if self._ready is None:
            self._ready = self.start_N1, self.column_E.int(), self.value_E.float()
        found: Tensor = torch.ops.aerogel.add_outliers(y_MN, x_MK, *self._ready)
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves, but never casts."""
        self._ready = None
        kept = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in kept.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self


class OutlierLinear(Linear):
    """A `Linear` with `outliers` weights kept beside its codes, which are loaded into its child (`weight_outliers`) or set."""

    kernel_is_all: ClassVar[bool] = False

    def __init__(self, *args: Any, outliers: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        empty = Outliers.empty(self.out_features, self.in_features, outliers, device=kwargs.get("device"))
        self.weight_outliers = Sidecar(empty)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in x's dtype."""
        y = super().forward(x)
        added: Tensor = self.weight_outliers(y.reshape(-1, self.out_features), x.reshape(-1, self.in_features))
        return added.reshape(y.shape)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight [N, K], outliers included."""
        return self.weight_outliers.outliers.put(super().dequantize(dtype))

    @property
    def packed_bytes(self) -> int:
        """Bytes of codes and of stored outliers."""
        held = self.weight_outliers.outliers.tensors().values()
        return super().packed_bytes + sum(tensor.nbytes for tensor in held)
