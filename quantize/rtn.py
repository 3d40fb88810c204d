"""Round to nearest: every weight to the closest value of its grid. No data needed, the baseline of everything else.

What can be chosen is the range of each group (`ranges`): by default the one with the least squared error instead of the
one that spans every weight, which alone removes a third of the error at 3 bits. With `weighted` the errors count by the
mean square of their input, which needs calibration but no solve. Cost: one pass per range tried.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.model.layer import Layer, Need
from aerogel.quantize.grids import Codes, Params, quantized
from aerogel.quantize.problem import check_weight, importance_of, relative_loss, second_moment
from aerogel.quantize.ranges import Search

if TYPE_CHECKING:
    from aerogel.quantize.grids import Grid


@dataclass(frozen=True, kw_only=True)
class RoundToNearest:
    """Stage `Layer -> Layer`.

    grid: the numbers to choose from.
    clip: `none` spans every weight, `mse` searches the range with the least error, `fisher` weighs each weight's error by its
        mean squared gradient (needs gradients).
    weighted: weigh errors by the mean square of the input they meet; needs calibration.
    norm: power of the error in the search.
    signed_scales: let symmetric scales be negative where that puts the longer side of the range to use.
    rounding: `nearest`, or `stochastic`: up or down at random, right on average and with more error; an emulation of what
        training in few bits does, see docs/methods/emulation.md.
    seed: of stochastic rounding, together with the layer's name.
    """

    grid: Grid
    clip: Literal["none", "mse", "fisher"] = "mse"
    weighted: bool = False
    norm: float = 2.0
    signed_scales: bool = True
    rounding: Literal["nearest", "stochastic"] = "nearest"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.clip == "fisher" and (reason := getattr(self.grid, "no_gradients", "")):
            raise BadInput(reason)
        Search(norm=self.norm)
        if self.rounding == "stochastic":
            from aerogel.quantize.emulate.training import check_random

            check_random(self.grid)
        if self.weighted and self.clip == "fisher":
            raise BadInput("errors are weighed by inputs (weighted: true) or by gradients (clip: fisher); choose one")

    @property
    def needs(self) -> frozenset[Need]:
        """The statistics asked of calibration."""
        return frozenset({"second_moment"} if self.weighted else {"fisher"} if self.clip == "fisher" else ())

    def __call__(self, layer: Layer) -> Layer:
        """The layer with codes; its loss is known where it has statistics. Pruned weights stay zero."""
        check_weight(layer, "rtn")
        importance = second_moment(layer, "rtn (weighted)").diagonal() if self.weighted else None
        if self.clip == "fisher":
            importance = importance_of(layer, "rtn")
        search = Search(kind="minmax" if self.clip == "none" else "mse", norm=self.norm, signed=self.signed_scales)
        kept_NK = layer.weight_NK.float() if layer.mask_NK is None else layer.weight_NK.float() * layer.mask_NK
        codes = self._rounded(kept_NK, self.grid.fit(kept_NK, importance, layer.mask_NK, search), layer.name)
        weight_NK = codes.decode()
        return layer.with_(
            weight_NK=weight_NK, codes=codes, loss=known_loss(layer, weight_NK), notes=weight_error(layer, weight_NK)
        )

    def _rounded(self, w_NK: Tensor, params: Params, name: str) -> Codes:
        if self.rounding == "nearest":
            return quantized(self.grid, w_NK, params)
        from aerogel.quantize.emulate.training import stochastic

        generator = torch.Generator().manual_seed(self.seed ^ zlib.crc32(name.encode()))
        return stochastic(self.grid, w_NK, params, generator)


def known_loss(layer: Layer, weight_NK: Tensor) -> float | None:
    """Relative output error where the layer has a second moment, for methods that do without."""
    stats = layer.stats
    if stats is None or stats.second_moment_KK is None or stats.tokens == 0:
        return None
    return relative_loss(layer.weight_NK, weight_NK, stats.second_moment_KK)


def weight_error(layer: Layer, weight_NK: Tensor) -> dict[str, object]:
    """|W - Q|^2 / |W|^2 for the notes of methods that see no data."""
    size = float(layer.weight_NK.square().sum(dtype=torch.float64))
    error = float((layer.weight_NK - weight_NK).square().sum(dtype=torch.float64))
    return {"weight_error": error / size if size > 0 else 0.0}
