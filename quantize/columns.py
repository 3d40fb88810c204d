"""Kept columns: the weights of a few inputs beside the codes, in 16 bits, whatever the codes are.

    y = Q8(x') W8^T + x_C W_C^T        x' is x with the inputs C at zero, W8 has code 0 there

A few features of a language model's hidden states are much larger than all others, and always the same ones. Rounded to
int8 together, a token's largest feature sets the unit, and the others fall into a handful of steps. LLM.int8() (Dettmers et
al. 2022, arXiv 2208.07339) multiplies features beyond 6.0 in 16 bits and the rest in int8. There the columns are found in
every product anew; that is `dynamic` here, and costs a look at x and a wait for its outcome. Since the features are the same
ones, calibration can name them once: their columns are stored in 16 bits, and what is left is a product of fixed shape.

Weights gain as well: the method that chooses codes sees these columns as zero under a mask, so they are exact, and GPTQ
spreads the errors of others around them.

Stored: `weight_column_index` int32 [C], `weight_column_value` [N, C], `weight_column_threshold` float32 [1] (0 where nothing
is looked for at run time). Cost: 16 C / K bits per weight, beside codes that stay where they are.

Shape legend: N out features, K in features, C kept columns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from aerogel.errors import BadInput, RunFailed
from aerogel.model.layer import Layer, Need
from aerogel.quantize.outliers import narrowed

if TYPE_CHECKING:
    from aerogel.pack.format import Shapes

PREFIX = "weight_column_"
NAMES = tuple(f"{PREFIX}{part}" for part in ("index", "value", "threshold"))


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The columns of a weight [N, K] that are kept.

    index_C: int32 [C], ascending.
    value_NC: bfloat16 or float16 [N, C].
    threshold_1: float32 [1]; above it an input of any token is multiplied in 16 bits at run time. 0: never.
    """

    index_C: Tensor
    value_NC: Tensor
    threshold_1: Tensor

    @staticmethod
    def of(w_NK: Tensor, index_C: Tensor, threshold: float = 0.0) -> Columns:
        """Columns `index_C` of a weight, in the 16-bit type that holds them with the smaller error."""
        found = index_C.sort().values
        return Columns(
            index_C=found.to(torch.int32),
            value_NC=narrowed(w_NK[:, found]).contiguous(),
            threshold_1=torch.tensor([threshold], device=w_NK.device),
        )

    @staticmethod
    def shapes(N: int, C: int) -> Shapes:
        """The stored tensors by local name; the values may be float16 as well."""
        kinds = (((C,), torch.int32), ((N, C), torch.bfloat16), ((1,), torch.float32))
        return dict(zip(NAMES, kinds, strict=True))

    @staticmethod
    def read(tensors: Mapping[str, Tensor]) -> Columns | None:
        """The inverse of `tensors`; None where a weight has no kept columns."""
        if NAMES[1] not in tensors:
            return None
        index, value, threshold = (tensors[name] for name in NAMES)
        return Columns(index_C=index, value_NC=value, threshold_1=threshold)

    def tensors(self) -> dict[str, Tensor]:
        """As they are stored, by local name."""
        return dict(zip(NAMES, (self.index_C, self.value_NC, self.threshold_1), strict=True))

    def check(self, N: int, K: int, name: str) -> None:
        """Raises `BadInput` unless these can be columns of a weight [N, K]; a kernel reads what they point at."""
        index_C = self.index_C.long()
        fits = self.value_NC.shape == (N, len(index_C)) and self.threshold_1.shape == (1,) and bool(self.threshold_1 >= 0)
        fits = fits and bool((index_C.diff() > 0).all())
        if not fits or (len(index_C) and not 0 <= int(index_C[0]) <= int(index_C[-1]) < K):
            raise BadInput(f"the columns of {name} are not those of a [{N}, {K}] weight; the file is damaged, get it again")

    @staticmethod
    def below(parts: Sequence[Columns | None], heights: Sequence[int]) -> Columns | None:
        """Those of weights under each other, of so many rows each; None where they are not the same columns."""
        first = parts[0]
        for part in parts:
            if part is None or first is None or part.value_NC.dtype != first.value_NC.dtype:
                return None
            if not (torch.equal(part.index_C, first.index_C) and torch.equal(part.threshold_1, first.threshold_1)):
                return None
        return replace(first, value_NC=torch.cat([part.value_NC for part in parts if part is not None])) if first else None

    def put(self, w_NK: Tensor) -> Tensor:
        """`w_NK` with the columns in their places. `w_NK` itself is changed."""
        w_NK[:, self.index_C.long()] = self.value_NC.to(w_NK)
        return w_NK


@dataclass(frozen=True, kw_only=True)
class KeepColumns:
    """Which inputs are multiplied in 16 bits beside the codes.

    columns: `none`; `threshold` keeps the columns of inputs that exceeded `column_threshold` on a calibration token, at
        most `column_share` of all, the largest; `largest` keeps the `column_share` of inputs with the largest peaks;
        `dynamic` looks in every product for inputs above `column_threshold` (LLM.int8()) and needs no data.
    column_threshold: see columns; in units of the input.
    column_share: see columns; a share of the layer's inputs. 0.01 costs 0.16 bits per weight.
    """

    columns: Literal["none", "threshold", "largest", "dynamic"] = "none"
    column_threshold: float = 6.0
    column_share: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.column_share <= 0.5:
            raise BadInput(f"column_share must lie above 0 and at most at 0.5, found {self.column_share}")
        if self.column_threshold <= 0:
            raise BadInput(f"column_threshold must be positive, found {self.column_threshold}")

    @property
    def needs(self) -> frozenset[Need]:
        """Peaks are taken where second moments are."""
        return frozenset({"second_moment"} if self.columns in ("threshold", "largest") else ())

    def count(self, K: int) -> int:
        """How many columns are kept; with `threshold`, the most that can be."""
        return math.ceil(self.column_share * K) if self.columns in ("threshold", "largest") else 0

    def choose(self, layer: Layer) -> Tensor:
        """int64 [C]: the columns to keep, ascending. Raises `RunFailed` without statistics."""
        K = layer.weight_NK.shape[1]
        if self.count(K) == 0:
            return torch.zeros(0, dtype=torch.int64, device=layer.weight_NK.device)
        if layer.stats is None or layer.stats.peak_K is None:
            raise RunFailed(f"columns: {self.columns} needs the peaks of the inputs of {layer.name}, and calibration kept none")
        best = layer.stats.peak_K.topk(self.count(K))
        found = best.indices[best.values > self.column_threshold] if self.columns == "threshold" else best.indices
        return found.sort().values

    def columns_of(self, w_NK: Tensor, index_C: Tensor) -> Columns:
        """What is stored for them."""
        return Columns.of(w_NK, index_C, self.column_threshold if self.columns == "dynamic" else 0.0)
