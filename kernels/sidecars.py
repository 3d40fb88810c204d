"""A packed linear with weights beside its codes: the product of its kernel, and small products on top.

    y_MN = kernel(x'_MK) + x_MC W_NC^T + x_MK S^T        W_NC kept columns, S [N, K] sparse outliers

Outliers: the sparse product is the library's (MKL on a CPU, cuSPARSE on CUDA) behind one operator, in float32, so that
torch.compile and traced steps see a single call. It reads 8 bytes per outlier, where 4-bit codes are half a byte per weight:
at 1 % of the weights 0.08 bytes per weight beside 0.53, 15 % more to read.

Columns: one dense product with C of the K inputs; 1 % of the columns beside int8 is 2 % more to read. Where the kernel rounds
its inputs, x' is x with these inputs at zero, so that they do not set the unit of all others; else x' = x. Both kinds see
the input as it is, also where the kernel rounds it. With a threshold (LLM.int8()) the columns depend on x: what is wanted is
read back to the host in every call, which no CUDA graph can hold.

A scale of inputs (static rounding) is no product: the kernel is called with it.

Rows of more bits: one more packed linear of R outputs through whatever kernel serves it, added to those outputs.

Shape legend: M tokens, N out features, K in features, C kept columns, E outliers, R rows of more bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from aerogel.kernels.linear import Linear
from aerogel.pack.format import Activations
from aerogel.quantize.sidecars import SIDECARS, Sidecar

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


class Product(nn.Module):
    """The tensors of one sidecar as buffers, under the names of its fields. They move with the model and are never cast."""

    def __init__(self, sidecar: Sidecar) -> None:
        super().__init__()
        self.kind = type(sidecar)
        for name, tensor in vars(sidecar).items():
            self.register_buffer(name, tensor)
        self._ready: Any = None

    @property
    def sidecar(self) -> Sidecar:
        """The buffers."""
        return self.kind(**self._buffers)  # type: ignore[arg-type]

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


class OutlierProduct(Product):
    """Adds the product with sparse outliers."""

    start_N1: Tensor
    column_E: Tensor
    value_E: Tensor

    def forward(self, y_MN: Tensor, x_MK: Tensor) -> Tensor:
        """y + x S^T."""
        if self._ready is None:
            self._ready = self.start_N1, self.column_E.int(), self.value_E.float()
        found: Tensor = torch.ops.aerogel.add_outliers(y_MN, x_MK, *self._ready)
        return found


class ColumnProduct(Product):
    """The kept columns, and with a threshold those that inputs have asked for so far: columns once met are held.

    Held columns are in the type of the activations: 2 N bytes each beside the N bytes of int8 that they have anyway.
    """

    index_C: Tensor
    value_NC: Tensor
    threshold_1: Tensor

    def stored(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Indices int64 [C] of the stored columns, and their weights [N, C] in `dtype`."""
        if self._ready is None or self._ready[1].dtype != dtype:
            self._ready = self.index_C.long(), self.value_NC.to(dtype)
            self._met, self._threshold = self._ready, float(self.threshold_1)
        found: tuple[Tensor, Tensor] = self._ready
        return found

    def wanted(self, x_MK: Tensor, weight: Callable[[torch.dtype], Tensor]) -> tuple[Tensor, Tensor]:
        """As `stored`, with the columns whose input exceeds the threshold somewhere in x.

        weight: decodes the whole weight; called when an input is loud whose column was never asked for.
        """
        stored = self.stored(x_MK.dtype)
        if self._threshold == 0:
            return stored
        loud_D = (x_MK.abs() > self._threshold).any(0).nonzero()[:, 0]
        index_C, value_NC = self._met
        new_D = loud_D[~torch.isin(loud_D, index_C)]
        if len(new_D):
            index_C = torch.cat([index_C, new_D])
            value_NC = torch.cat([value_NC, weight(x_MK.dtype)[:, new_D]], 1)
            self._met = index_C, value_NC
        here = torch.isin(index_C, loud_D)
        here[: len(stored[0])] = True
        return index_C[here], value_NC[:, here]


class RowProduct(Product):
    """What some rows lack, as one more packed linear; its outputs are added to theirs."""

    def ready(self, like: Linear) -> Self:
        """Chooses the kernel for the activations of `like`, the linear beside which the rows are."""
        activations: Activations = "int8" if like.scheme.activations == "int8" else "none"
        linear = Linear.from_codes(self.sidecar.codes(), activations=activations, dtype=like.compute_dtype)  # type: ignore[union-attr]
        self._ready = linear, self.sidecar.index_R.long()  # type: ignore[union-attr]
        return self

    def forward(self, y_MN: Tensor, x_MK: Tensor) -> Tensor:
        """y with the rows' part added."""
        linear, index_R = self._ready
        return y_MN.index_add(1, index_R, linear(x_MK))


class InputScaleHeld(Product):
    """The unit of inputs that are rounded to bytes."""

    scale_1: Tensor


PRODUCTS: dict[str, type[Product]] = {
    "weight_outliers": OutlierProduct,
    "weight_columns": ColumnProduct,
    "weight_rows": RowProduct,
    "input_scale": InputScaleHeld,
}


class SidecarLinear(Linear):
    """A `Linear` with weights kept beside its codes, in children that are named as in `quantize.sidecars.SIDECARS`.

    beside: the stored tensors of all its sidecars by local name, to be overwritten by loading or complete.
    """

    kernel_is_all: ClassVar[bool] = False

    def __init__(self, *args: Any, beside: Mapping[str, Tensor] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.keep(beside or {})

    def keep(self, beside: Mapping[str, Tensor]) -> Self:
        """Takes the sidecars among these tensors."""
        for key, read_one in SIDECARS.items():
            sidecar = read_one(beside)
            if sidecar is not None:
                self.add_module(key, PRODUCTS[key](sidecar))
        return self

    def operands(self) -> dict[str, Tensor]:
        """As `Linear` has them, with the scale of its inputs where that is stored."""
        held = self._modules.get("input_scale")
        return super().operands() | ({"input_scale": held.scale_1} if isinstance(held, InputScaleHeld) else {})

    def prepare(self, dtype: torch.dtype | None = None, *, overwrite: bool = False) -> Self:
        """As `Linear` does it, for rows of more bits as well."""
        super().prepare(dtype, overwrite=overwrite)
        for product in self._products():
            if isinstance(product, RowProduct):
                product.ready(self)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in x's dtype."""
        x_MK = x.reshape(-1, self.in_features)
        columns, outliers = (self._modules.get(key) for key in ("weight_columns", "weight_outliers"))
        y_MN = self._beside_columns(columns, x_MK) if isinstance(columns, ColumnProduct) else super().forward(x_MK)
        if outliers is not None:
            y_MN = outliers(y_MN, x_MK)
        if "weight_rows" in self._modules:
            y_MN = self._modules["weight_rows"](y_MN, x_MK)  # type: ignore[misc]
        return y_MN.reshape(*x.shape[:-1], self.out_features)

    def _beside_columns(self, columns: ColumnProduct, x_MK: Tensor) -> Tensor:
        """The product in two parts. Only where inputs are rounded must the kernel not see those of the kept columns."""
        if self.scheme.activations == "none" and not self.rounds_activations:
            index_C, value_NC = columns.stored(x_MK.dtype)
            quiet_MK = x_MK
        else:
            index_C, value_NC = columns.wanted(x_MK, super().dequantize)
            quiet_MK = x_MK.index_fill(1, index_C, 0)
        return torch.addmm(super().forward(quiet_MK), x_MK[:, index_C], value_NC.T)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight [N, K], with what is kept in its place."""
        w_NK = super().dequantize(dtype)
        for product in self._products():
            product.sidecar.put(w_NK)
        return w_NK

    @property
    def packed_bytes(self) -> int:
        """Bytes of codes and of what is stored beside them."""
        held = (tensor for product in self._products() for tensor in product.sidecar.tensors().values())
        return super().packed_bytes + sum(tensor.nbytes for tensor in held)

    def _products(self) -> list[Product]:
        return [product for product in self.children() if isinstance(product, Product)]
