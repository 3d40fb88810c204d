"""Sparse outliers: a few weights beside the codes, kept in 16 bits, whatever the codes are.

    W = codes + S        S sparse; where S holds a weight the code is 0, so that W is S there and nothing is added twice

A group's range is set by its largest weight. EasyQuant (Tang et al. 2024, arXiv 2403.02775) takes the weights beyond n
standard deviations out, keeps them exact and fits the range to what remains; SqueezeLLM (Kim et al. 2024, arXiv
2306.07629) takes out those whose rounding would cost most. Here both are a rule that picks; the method that chooses codes sees
what is left (`sidecars.Keeping`).

Ranges need no code of their own: `clip: mse`, the default of round to nearest, searches them for what remains, where
EasyQuant descends on the same loss with Adam.

Stored by row (CSR), 32 bits for each outlier where K <= 32768: 1 % of the weights is 0.32 bits per weight.

Shape legend: N out features, K in features, E outliers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.model.layer import Layer, Need
from aerogel.quantize.problem import second_moment

if TYPE_CHECKING:
    from aerogel.pack.format import Shapes

PREFIX = "weight_outlier_"
"""What the names of stored outliers begin with, beside the packed weight's own tensors."""
NAMES = tuple(f"{PREFIX}{part}" for part in ("start", "column", "value"))
NARROW = 1 << 15
"""Inputs up to which a column number fits 16 bits."""


@dataclass(frozen=True, kw_only=True)
class Outliers:
    """Weights [N, K] that are kept, by row.

    start_N1: int32 [N + 1], where the outliers of each row begin.
    column_E: int16 (K <= 32768) or int32 [E], ascending within a row.
    value_E: bfloat16 or float16 [E].
    """

    start_N1: Tensor
    column_E: Tensor
    value_E: Tensor

    @staticmethod
    def of(w_NK: Tensor, mask_NK: Tensor) -> Outliers:
        """The weights where `mask_NK` is True, in the 16-bit type that holds them with the smaller error."""
        N, K = w_NK.shape
        value_E = w_NK[mask_NK]
        start_N1 = torch.zeros(N + 1, dtype=torch.int32, device=w_NK.device)
        start_N1[1:] = mask_NK.sum(1).cumsum(0)
        column_E = mask_NK.nonzero()[:, 1].to(torch.int16 if K <= NARROW else torch.int32)
        return Outliers(start_N1=start_N1, column_E=column_E, value_E=narrowed(value_E))

    @staticmethod
    def shapes(N: int, K: int, E: int) -> Shapes:
        """The stored tensors by local name; the values may be float16 as well."""
        return {
            f"{PREFIX}start": ((N + 1,), torch.int32),
            f"{PREFIX}column": ((E,), torch.int16 if K <= NARROW else torch.int32),
            f"{PREFIX}value": ((E,), torch.bfloat16),
        }

    @staticmethod
    def read(tensors: Mapping[str, Tensor]) -> Outliers | None:
        """The inverse of `tensors`; None where a weight has no outliers."""
        if f"{PREFIX}value" not in tensors:
            return None
        start, column, value = (tensors[f"{PREFIX}{part}"] for part in ("start", "column", "value"))
        return Outliers(start_N1=start, column_E=column, value_E=value)

    def tensors(self) -> dict[str, Tensor]:
        """As they are stored, by local name."""
        return {f"{PREFIX}start": self.start_N1, f"{PREFIX}column": self.column_E, f"{PREFIX}value": self.value_E}

    def check(self, N: int, K: int, name: str) -> None:
        """Raises `BadInput` unless these can be outliers of a weight [N, K]; a kernel reads what they point at."""
        E = len(self.value_E)
        fits = self.start_N1.shape == (N + 1,) and self.column_E.shape == (E,) and int(self.start_N1[-1]) == E
        fits = fits and int(self.start_N1[0]) == 0 and bool((self.start_N1.diff() >= 0).all())
        if not fits or (E and not 0 <= int(self.column_E.min()) <= int(self.column_E.max()) < K):
            raise BadInput(f"the outliers of {name} are not those of a [{N}, {K}] weight; the file is damaged, get it again")

    @staticmethod
    def below(parts: Sequence[Outliers | None], heights: Sequence[int]) -> Outliers | None:
        """Those of weights under each other, of so many rows each; None where some have none or another type."""
        given = [part for part in parts if part is not None]
        if len(given) != len(parts) or len({(part.column_E.dtype, part.value_E.dtype) for part in given}) != 1:
            return None
        firsts = list(accumulate([part.value_E.numel() for part in given], initial=0))
        starts = [part.start_N1[:-1] + first for part, first in zip(given, firsts, strict=False)]
        return Outliers(
            start_N1=torch.cat([*starts, starts[0].new_tensor([firsts[-1]])]),
            column_E=torch.cat([part.column_E for part in given]),
            value_E=torch.cat([part.value_E for part in given]),
        )

    def places(self) -> tuple[Tensor, Tensor]:
        """Row and column of each outlier, int64 [E]."""
        counts_N = self.start_N1.long().diff()
        rows_N = torch.arange(len(counts_N), device=counts_N.device)
        return rows_N.repeat_interleave(counts_N), self.column_E.long()

    def put(self, w_NK: Tensor) -> Tensor:
        """`w_NK` with the outliers in their places; the codes must be 0 there. `w_NK` itself is changed."""
        w_NK[self.places()] = self.value_E.to(w_NK)
        return w_NK


def narrowed(values: Tensor) -> Tensor:
    """Values in whichever of bfloat16 and float16 loses less."""
    candidates = [values.to(torch.bfloat16), values.to(torch.float16)]
    errors = [float((candidate.float() - values.float()).abs().sum()) for candidate in candidates]
    return candidates[0] if not errors[1] < errors[0] else candidates[1]


@dataclass(frozen=True, kw_only=True)
class Keep:
    """Which weights are outliers.

    outliers: `none`; `sigma` keeps weights further than `outlier_sigma` standard deviations from the mean (EasyQuant),
        and at most `outlier_share` of all, the furthest; `sensitivity` keeps the `outlier_share` with the largest
        w^2 E[x^2], what the output would lose if they were zero (SqueezeLLM), and needs calibration.
    outlier_sigma: see outliers.
    outlier_share: see outliers; a share of the layer's weights. 0.01 costs 0.32 bits per weight.
    """

    outliers: Literal["none", "sigma", "sensitivity"] = "none"
    outlier_sigma: float = 3.0
    outlier_share: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.outlier_share <= 0.1:
            raise BadInput(f"outlier_share must lie above 0 and at most at 0.1, found {self.outlier_share}")
        if self.outlier_sigma <= 0:
            raise BadInput(f"outlier_sigma must be positive, found {self.outlier_sigma}")

    @property
    def needs(self) -> frozenset[Need]:
        """The second moment where outliers are ranked by it."""
        return frozenset({"second_moment"} if self.outliers == "sensitivity" else ())

    def count(self, N: int, K: int) -> int:
        """How many weights are kept; with `sigma`, the most that can be."""
        return math.ceil(self.outlier_share * N * K)

    def choose(self, layer: Layer) -> Tensor:
        """bool [N, K], True for outliers; never a pruned weight."""
        w_NK = layer.weight_NK.float() if layer.mask_NK is None else layer.weight_NK.float() * layer.mask_NK
        if self.outliers == "sensitivity":
            score_NK = w_NK.square() * second_moment(layer, "outliers: sensitivity").diagonal().float()
        else:
            score_NK = (w_NK - w_NK.mean()).abs()
            score_NK = score_NK.masked_fill(score_NK <= self.outlier_sigma * w_NK.std(correction=0), 0)
        if layer.mask_NK is not None:
            score_NK = score_NK * layer.mask_NK
        best = score_NK.flatten().topk(self.count(*w_NK.shape))
        chosen = torch.zeros(w_NK.numel(), dtype=torch.bool, device=w_NK.device)
        # `sensitivity` keeps exactly its share, so that sizes are known before the data are.
        found = best.indices[best.values > 0] if self.outliers == "sigma" or layer.mask_NK is not None else best.indices
        chosen[found] = True
        return chosen.view_as(w_NK)
