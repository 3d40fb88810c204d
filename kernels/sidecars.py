"""A packed linear with weights beside its codes: the product of its kernel, and small products on top.

    y_MN = kernel(x'_MK) + x_MC W_NC^T + x_MK S^T        W_NC kept columns, S [N, K] sparse outliers

Outliers and columns are added together: by the kernel itself where it can, as they are stored (`Kernel.adds_beside`) or as it
lays them out once (`Kernel.lay_beside`), else by one small operator (`kernels/beside`). An outlier reads 4 bytes, where 4-bit
codes are half a byte per weight: at 1 % of the weights 0.04 bytes per weight beside 0.53, 8 % more to read; 1 % of the columns
beside int8 is 2 % more. Where the kernel rounds its inputs, x' is x with the inputs of kept columns at zero, so that they do
not set the unit of all others; else x' = x. Both kinds see the input as it is, also where the kernel rounds it. With a
threshold (LLM.int8()) the columns depend on x: what is wanted is read back to the host in every call, which no CUDA graph can
hold.

A scale of inputs (static rounding) is no product: the kernel is called with it. A rotation comes before everything: the kernel
sees x R; and so do factors of inputs: it sees s x.

Rows of more bits: one more packed linear of R outputs through whatever kernel serves it, added to those outputs.

Shape legend: M tokens, N out features, K in features, C kept columns, E outliers, R rows of more bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from aerogel.kernels.beside import choose as beside_ops
from aerogel.kernels.beside.cpu import fits, tiles_of
from aerogel.kernels.beside.ref import Beside
from aerogel.kernels.gradients import inference_only
from aerogel.kernels.hadamard import choose as hadamard_ops
from aerogel.kernels.linear import Linear
from aerogel.kernels.packed import Uncast
from aerogel.pack.format import Activations
from aerogel.quantize.sidecars import SIDECARS, Sidecar, decoding_dtype


class Product(Uncast):
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
        """Moves; what was made of the buffers is made again."""
        self._ready = None
        return super()._apply(fn, recurse)


class OutlierProduct(Product):
    """The sparse outliers."""

    start_N1: Tensor
    column_E: Tensor
    value_E: Tensor

    @property
    def beside(self) -> Beside:
        """What is added."""
        return Beside(self.start_N1, self.column_E, self.value_E, tiles=self._ready)

    def ready(self, tiles: Tensor | None) -> None:
        """Takes what was made of the stored tensors, until they change."""
        self._ready = tiles

    def forward(self, y_MN: Tensor, x_MK: Tensor) -> Tensor:
        """y + x S^T."""
        return beside_ops.add(y_MN, x_MK, self.beside)


class ColumnProduct(Product):
    """The kept columns, and with a threshold those that inputs have asked for so far: columns once met are held.

    Held columns are in the type of the activations: 2 N bytes each beside the N bytes of int8 that they have anyway.
    """

    index_C: Tensor
    value_NC: Tensor
    threshold_1: Tensor

    @property
    def looks(self) -> bool:
        """Whether the columns depend on the inputs."""
        if self._ready is None:
            self._ready = float(self.threshold_1)
            self._met = self.index_C, self.value_NC
        return bool(self._ready > 0)

    def wanted(self, x_MK: Tensor, weight: Callable[[torch.dtype], Tensor]) -> tuple[Tensor, Tensor]:
        """Indices int32 [C] of the stored columns, and of those whose input exceeds the threshold somewhere in x, and their
        weights [N, C].

        weight: decodes the whole weight; called when an input is loud whose column was never asked for.
        """
        loud_D = (x_MK.abs() > self._ready).any(0).nonzero()[:, 0].int()
        index_C, value_NC = self._met
        new_D = loud_D[~torch.isin(loud_D, index_C)]
        if len(new_D):
            index_C = torch.cat([index_C, new_D])
            value_NC = torch.cat([value_NC.to(x_MK.dtype), weight(x_MK.dtype)[:, new_D.long()]], 1)
            self._met = index_C, value_NC
        here = torch.isin(index_C, loud_D)
        here[: len(self.index_C)] = True
        return index_C[here], value_NC[:, here].contiguous()


class RowProduct(Product):
    """What some rows lack, as one more packed linear; its outputs are added to theirs."""

    def ready(self, like: Linear) -> Self:
        """Chooses the kernel for the activations of `like`, the linear beside which the rows are."""
        activations: Activations = "int8" if like.scheme.activations == "int8" else "none"
        linear = Linear.from_codes(self.sidecar.codes(), activations=activations, dtype=like.compute_dtype)  # type: ignore[union-attr]
        self._ready = linear, self.sidecar.index_R.long()  # type: ignore[union-attr]
        return self

    @property
    def added(self) -> tuple[Linear, Tensor]:
        """The linear, and the outputs that its outputs join, int64 [R]."""
        found: tuple[Linear, Tensor] = self._ready
        return found

    def forward(self, y_MN: Tensor, x_MK: Tensor) -> Tensor:
        """y with the rows' part added."""
        linear, index_R = self.added
        return y_MN.index_add(1, index_R, linear(x_MK))


class InputScaleHeld(Product):
    """The unit of inputs that are rounded to bytes."""

    scale_1: Tensor


class RotationProduct(Product):
    """The rotation of inputs."""

    signs_K: Tensor
    block_1: Tensor

    def ready(self) -> None:
        """Reads the block once: a call must not wait for the device."""
        self._ready = int(self.block_1)

    @property
    def held(self) -> tuple[Tensor, int]:
        """Signs int8 [K] and the block."""
        return self.signs_K, self._ready

    def forward(self, x_MK: Tensor) -> Tensor:
        """x R in x's type, from float32."""
        return hadamard_ops.turned(x_MK, *self.held)


class InputFactorProduct(Product):
    """The factors of inputs."""

    factor_K: Tensor

    def forward(self, x_MK: Tensor) -> Tensor:
        """s x in x's type."""
        return x_MK * self.factor_K.to(x_MK.dtype)


PRODUCTS: dict[str, type[Product]] = {
    "weight_outliers": OutlierProduct,
    "weight_columns": ColumnProduct,
    "weight_rows": RowProduct,
    "input_scale": InputScaleHeld,
    "rotation": RotationProduct,
    "input_factor": InputFactorProduct,
}


class SidecarLinear(Linear):
    """A `Linear` with weights kept beside its codes, in children that are named as in `quantize.sidecars.SIDECARS`.

    beside: the stored tensors of all its sidecars by local name, to be overwritten by loading or complete.
    """

    kernel_is_all: ClassVar[bool] = False

    def __init__(self, *args: Any, beside: Mapping[str, Tensor] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._adds: bool | None = None
        self._laid: dict[str, Tensor] | None = None
        self._added: dict[str, Tensor] | None = None
        self.keep(beside or {})

    def keep(self, beside: Mapping[str, Tensor]) -> Self:
        """Takes the sidecars among these tensors."""
        for key, read_one in SIDECARS.items():
            sidecar = read_one(beside)
            if sidecar is not None:
                self.add_module(key, PRODUCTS[key](sidecar))
        return self if self._problem is None else self.ready()

    def operands(self) -> dict[str, Tensor]:
        """As `Linear` has them, with the scale of its inputs where that is stored."""
        held = self._modules.get("input_scale")
        scale = {"input_scale": held.scale_1} if isinstance(held, InputScaleHeld) else {}
        return super().operands() | scale | (self._laid or {})

    def prepare(self, dtype: torch.dtype | None = None, *, overwrite: bool = False) -> Self:
        """As `Linear` does it, for rows of more bits as well."""
        super().prepare(dtype, overwrite=overwrite)
        return self.ready()

    def ready(self) -> Self:
        """Makes what stands beside the weight ready for the kernel that was chosen."""
        stored, order, problem = self._stored(), self.column_order, self._problem or self.problem()
        self._adds = self._kernel.adds_beside and order is None and fits(self.out_features, stored)
        self._laid = None
        if stored.operands() and not self._looks():
            place_K = None if order is None else order.argsort()
            self._laid = self._kernel.lay_beside(stored, super().operands(), problem, place_K)
        for product in self._products():
            if isinstance(product, RowProduct):
                product.ready(self)
            if isinstance(product, RotationProduct):
                product.ready()
            if isinstance(product, OutlierProduct):
                product.ready(tiles_of(stored, problem.N, problem.K, problem.dtype) if self._adds else None)
        # Gathered once: a call has as many microseconds as a small weight.
        self._added = self._stored().operands() if self._adds and not self._looks() else None
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As `Linear` does it; what was gathered is gathered again when the kernel is chosen."""
        self._added = None
        return super()._apply(fn, recurse)

    def allow_fast_activations(self, allowed: bool = True) -> Self:
        """As `Linear` does it; another kernel may have to add what stands beside the weight."""
        super().allow_fast_activations(allowed)
        return self.ready()

    @inference_only
    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in x's dtype."""
        if self._problem is None:
            self.prepare(x.dtype)
        problem = self._problem or self.problem()
        x_MK = x.reshape(-1, self.in_features).contiguous()
        for before in ("input_factor", "rotation"):
            if before in self._modules:
                x_MK = self._modules[before](x_MK)  # type: ignore[misc]
        if self._adds and x.dtype is problem.dtype and not torch.compiler.is_compiling():
            added = self._wanted(x_MK).operands() if self._added is None else self._added
            y_MN = self._kernel.run(x_MK, self.operands() | added, problem, self.bias)
        else:
            beside = Beside() if self._laid is not None else self._wanted(x_MK)
            hides = beside.index_C is not None and self.hides_columns
            seen_MK = x_MK.index_fill(1, beside.index_C.long(), 0) if hides else x_MK  # type: ignore[union-attr]
            y_MN = self.product(seen_MK, self.bias)
            y_MN = beside_ops.add(y_MN, x_MK, beside) if beside.operands() else y_MN
        if "weight_rows" in self._modules:
            y_MN = self._modules["weight_rows"](y_MN, x_MK)  # type: ignore[misc]
        return y_MN.reshape(*x.shape[:-1], self.out_features)

    @property
    def hides_columns(self) -> bool:
        """Whether the kernel must not see the inputs of kept columns: where it rounds what it sees."""
        return self.scheme.activations != "none" or self.rounds_activations

    def added_by_kernel(self) -> Beside | None:
        """What the kernel adds itself at every call, perhaps nothing, for callers that record calls; None where more runs than
        the kernel, `turned_before` and `rows_added`."""
        stored = self._stored()
        by_kernel = self._adds or not stored.operands()
        scaled = "input_scale" in self._modules or "input_factor" in self._modules
        return stored if by_kernel and not self._looks() and not scaled else None

    def turned_before(self) -> tuple[Tensor, int] | None:
        """The rotation of its inputs before everything else: signs int8 [K] and the block; None where there is none."""
        rotation = self._modules.get("rotation")
        return rotation.held if isinstance(rotation, RotationProduct) else None

    def rows_added(self) -> tuple[Linear, Tensor] | None:
        """The linear whose outputs join some of this one's, and which, int64 [R]; None where there is none."""
        rows = self._modules.get("weight_rows")
        return rows.added if isinstance(rows, RowProduct) else None

    def _looks(self) -> bool:
        """Whether what is added depends on the inputs."""
        columns = self._modules.get("weight_columns")
        return isinstance(columns, ColumnProduct) and self.hides_columns and columns.looks

    def _stored(self) -> Beside:
        """What is stored beside the weight."""
        outliers, columns = (self._modules.get(key) for key in ("weight_outliers", "weight_columns"))
        found = outliers.beside if isinstance(outliers, OutlierProduct) else Beside()
        return found if columns is None else replace(found, index_C=columns.index_C, kept_NC=columns.value_NC)  # type: ignore[arg-type]

    def _wanted(self, x_MK: Tensor) -> Beside:
        """What is added to the kernel's product of these inputs."""
        columns = self._modules.get("weight_columns")
        if not isinstance(columns, ColumnProduct) or not self._looks():
            return self._stored()
        index_C, kept_NC = columns.wanted(x_MK, super().dequantize)
        return replace(self._stored(), index_C=index_C, kept_NC=kept_NC)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight [N, K], with what is kept in its place."""
        dtype = dtype or self.compute_dtype
        w_NK = super().dequantize(decoding_dtype(self._modules, dtype))
        for product in self._products():
            product.sidecar.put(w_NK)
        return w_NK.to(dtype)

    @property
    def packed_bytes(self) -> int:
        """Bytes of codes and of what is stored beside them, as it was stored and as the kernel takes it."""
        stored = [tensor for product in self._products() for tensor in product.sidecar.tensors().values()]
        held = {tensor.data_ptr(): tensor.nbytes for tensor in (*stored, *(self._laid or {}).values(), *self._tiles())}
        return super().packed_bytes + sum(held.values())

    def _tiles(self) -> list[Tensor]:
        tiles = self._stored().tiles
        return [] if tiles is None else [tiles]

    def _products(self) -> list[Product]:
        return [product for product in self.children() if isinstance(product, Product)]
