"""What may stand beside codes, whatever the codes are, and the stage that takes it out before codes are chosen.

    W = codes + the sidecars        where a sidecar holds a weight the code is 0, so that nothing is added twice; only rows of
                                    more bits (`rows`) add to what is coded. `input_scale` holds no weight,
                                    `rotation` says in which basis the codes are, `input_factor` in which units

A sidecar is a frozen dataclass of tensors with `shapes`, `read`, `tensors`, `check` and `put`; `SIDECARS` lists them, and
everything else (storing, loading, planning, exporting) goes over that list. Any method solves what remains: it sees the
weight without what is kept, and a mask that forbids it to use those places, which GPTQ honours inside its recursion.

Shape legend: N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aerogel.errors import RunFailed
from aerogel.model.layer import Layer, Need, solve_together
from aerogel.quantize import columns as kept_columns
from aerogel.quantize import input_factor, input_scale, rotation
from aerogel.quantize import outliers as sparse_outliers
from aerogel.quantize import rows as finer_rows
from aerogel.quantize.codes import no_zeros
from aerogel.quantize.columns import Columns, KeepColumns
from aerogel.quantize.input_factor import InputFactor
from aerogel.quantize.input_scale import InputScale
from aerogel.quantize.outliers import Keep, Outliers
from aerogel.quantize.problem import relative_loss
from aerogel.quantize.rotation import Rotation
from aerogel.quantize.rows import Rows
from aerogel.quantize.rtn import weight_error

if TYPE_CHECKING:
    from aerogel.pack.format import Shapes

Sidecar = Outliers | Columns | Rows | InputScale | Rotation | InputFactor
SIDECARS: dict[str, Callable[[Mapping[str, Tensor]], Sidecar | None]] = {
    "weight_outliers": Outliers.read,
    "weight_columns": Columns.read,
    "weight_rows": Rows.read,
    "input_scale": InputScale.read,
    "rotation": Rotation.read,
    "input_factor": InputFactor.read,
}
"""Name of the module that runs a sidecar (`kernels/sidecars.py`) -> what reads it from stored tensors, None without any."""
NAMES = (
    *(*sparse_outliers.NAMES, *kept_columns.NAMES, *finer_rows.NAMES),
    *(*input_scale.NAMES, *rotation.NAMES, *input_factor.NAMES),
)
"""Local names of everything that a sidecar stores beside a packed weight."""


def read(tensors: Mapping[str, Tensor], N: int, K: int, name: str) -> dict[str, Sidecar]:
    """The sidecars among the tensors of a packed weight [N, K]. Raises `BadInput` for those of another weight."""
    found: dict[str, Sidecar] = {}
    for key, read_one in SIDECARS.items():
        sidecar = read_one(tensors)
        if sidecar is not None:
            sidecar.check(N, K, name)
            found[key] = sidecar
    return found


def below(parts: Sequence[Mapping[str, Sidecar]], heights: Sequence[int]) -> dict[str, Tensor] | None:
    """The tensors of what stands beside several weights, as one weight of their rows under each other has them.

    None where they cannot be those of one weight: columns that differ, values of several types.
    """
    tensors: dict[str, Tensor] = {}
    for key in SIDECARS:
        mine = [part.get(key) for part in parts]
        given = [sidecar for sidecar in mine if sidecar is not None]
        if not given:
            continue
        joined = type(given[0]).below(mine, heights)  # type: ignore[arg-type]
        if joined is None:
            return None
        tensors |= joined.tensors()
    return tensors


def decoding_dtype(names: Iterable[str], dtype: torch.dtype) -> torch.dtype:
    """The type in which a weight with these sidecars is decoded on its way to `dtype`: where factors follow, a wider one, so
    that the product is rounded once. names: keys of `SIDECARS`, or local names of stored tensors."""
    return torch.float32 if {"input_factor", *input_factor.NAMES} & set(names) else dtype


def with_sidecars(w_NK: Tensor, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A decoded weight with what is stored beside it, if anything, in its place. `w_NK` itself is changed."""
    N, K = w_NK.shape
    for sidecar in read(tensors, N, K, name).values():
        sidecar.put(w_NK)
    return w_NK


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """Stage `Layer -> Layer`: `method` on what is left when outliers and columns are taken out.

    Where the method moves weights towards the dense model's outputs first (gptaq), they are taken out of the moved weight.
    """

    method: Any
    keep: Keep = Keep()  # noqa: RUF009  (frozen)
    columns: KeepColumns = KeepColumns()  # noqa: RUF009

    def __post_init__(self) -> None:
        if numbers := getattr(self.grid, "without_zero", ""):
            raise no_zeros(numbers)

    @property
    def grid(self) -> Any:
        """The method's."""
        return self.method.grid

    def on(self, grid: Any) -> Keeping:
        """The same stage on another grid."""
        return replace(self, method=replace(self.method, grid=grid))

    @property
    def needs(self) -> frozenset[Need]:
        """The method's, and those of the rules."""
        return self.keep.needs | self.columns.needs | frozenset(getattr(self.method, "needs", ()))

    def shapes(self, N: int, K: int) -> Shapes:
        """What is stored beside the codes of a weight [N, K]; where the data decide, the most that can be."""
        found: Shapes = {}
        if self.keep.outliers != "none":
            found |= Outliers.shapes(N, K, self.keep.count(N, K))
        if self.columns.columns != "none":
            found |= Columns.shapes(N, self.columns.count(K))
        return found

    def __call__(self, layer: Layer) -> Layer:
        """The layer with codes and sidecars."""
        return self.call_group((layer,))[0]

    def call_group(self, layers: Sequence[Layer]) -> list[Layer]:
        """Several layers, handed to the method together where it takes several."""
        method = self.method
        if getattr(method, "gptaq", False):
            layers = method.moved(layers)
            method = replace(method, gptaq=False)
        taken = [self._take(layer) for layer in layers]
        rest = [_without(layer, mask) for layer, (mask, _) in zip(layers, taken, strict=True)]
        solved = solve_together(method, rest)
        return [_with(layer, found, *held) for layer, found, held in zip(layers, solved, taken, strict=True)]

    def _take(self, layer: Layer) -> tuple[Tensor, tuple[Sidecar, ...]]:
        """Where weights are kept, bool [N, K], and what keeps them. No weight is kept twice."""
        w_NK = layer.weight_NK if layer.mask_NK is None else layer.weight_NK * layer.mask_NK
        mask_NK = torch.zeros_like(w_NK, dtype=torch.bool)
        found: list[Sidecar] = []
        if self.columns.columns != "none":
            index_C = self.columns.choose(layer)
            mask_NK[:, index_C] = True
            found.append(self.columns.columns_of(w_NK, index_C))
        if self.keep.outliers != "none":
            sparse_NK = self.keep.choose(_without(layer, mask_NK) if bool(mask_NK.any()) else layer)
            mask_NK |= sparse_NK
            found.append(Outliers.of(w_NK, sparse_NK))
        return mask_NK, tuple(found)


def _without(layer: Layer, mask_NK: Tensor) -> Layer:
    """The layer less what is kept. What 16 bits could not hold of it is nobody's: a code there would be added to it."""
    free_NK = ~mask_NK if layer.mask_NK is None else layer.mask_NK & ~mask_NK
    return layer.with_(weight_NK=layer.weight_NK.masked_fill(mask_NK, 0), mask_NK=free_NK)


def _with(layer: Layer, solved: Layer, mask_NK: Tensor, found: tuple[Sidecar, ...]) -> Layer:
    if bool(solved.weight_NK[mask_NK].any()):
        raise RunFailed(f"{layer.name}: the format has no code for 0, so nothing can be kept beside it; leave that out")
    weight_NK = solved.weight_NK.clone()
    for sidecar in found:
        sidecar.put(weight_NK)
    stats = layer.stats
    known = stats is not None and stats.second_moment_KK is not None and stats.tokens > 0
    loss = relative_loss(layer.weight_NK, weight_NK, stats.second_moment_KK) if known else None  # type: ignore[union-attr, arg-type]
    notes: dict[str, object] = dict(weight_error(layer, weight_NK))
    for sidecar in found:
        if isinstance(sidecar, Outliers):
            notes |= {"outliers": sidecar.value_E.numel(), "outlier_share": sidecar.value_E.numel() / weight_NK.numel()}
        elif isinstance(sidecar, Columns):
            notes |= {"columns": len(sidecar.index_C), "column_share": len(sidecar.index_C) / weight_NK.shape[1]}
    return replace(solved, weight_NK=weight_NK, mask_NK=layer.mask_NK, sidecars=found, loss=loss).with_(notes=notes)
