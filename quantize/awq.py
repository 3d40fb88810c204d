"""AWQ: scale up the channels that matter before rounding, and the producer down by as much.

Equation (Lin et al. 2023, arXiv 2306.00978): s = a^r / sqrt(max a^r min a^r) with a_k the magnitude of input channel k.
The ratio r is searched in `steps` values from 0 on, each judged by what rounding then does to the output,

    sum over consumers of tr(D H D^T),  D = Q(W diag(s)) diag(1/s) - W

H holds everything about the inputs that this needs, so no forward pass is repeated. Magnitudes are root mean squares
(diagonal of H) where the paper takes means of |x|: both rank channels alike, and this one costs no further statistic.
`Q` fits its ranges as the quantize stage that follows will: by squared error weighted with H.
r = 0 is s = 1, so the choice is never worse than leaving the site alone on the calibration data.
Cost: `steps` times rounding plus N K^2 multiply-adds per consumer.

Shape legend: N out features, K channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.model.layer import Layer, Need
from aerogel.quantize.grids import Grid
from aerogel.quantize.problem import ROWS, check_weight, second_moment
from aerogel.quantize.ranges import Search
from aerogel.quantize.site import Site


@dataclass(frozen=True, kw_only=True)
class Awq:
    """Stage `Site -> Site`: fills `scale_K`.

    steps: ratios tried, 0, 1/steps, ... below 1.
    clip: how ranges are fitted while ratios are compared: `none`, `mse`, or `hessian` (weighted by the channels).
    """

    steps: int = 20
    clip: Literal["none", "mse", "hessian"] = "hessian"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise BadInput(f"steps must be positive, found {self.steps}")

    @property
    def needs(self) -> frozenset[Need]:
        """The statistics asked of calibration."""
        return frozenset({"second_moment"})

    def __call__(self, site: Site) -> Site:
        """The site with the best scale found. Raises `RunFailed` where calibration saw nothing of a consumer."""
        moments = [second_moment(layer, "awq") for layer in site.consumers]
        for layer in site.consumers:
            check_weight(layer, "awq")
        relative = [h_KK.diagonal() / h_KK.diagonal().mean() for h_KK in moments]
        magnitude_K = site.tied(torch.stack(relative).mean(0)).sqrt()
        trials = [(step / self.steps, _scale(magnitude_K, step / self.steps)) for step in range(self.steps)]
        losses = [self._loss(site, moments, scale_K) for _, scale_K in trials]
        best = min(range(len(trials)), key=losses.__getitem__)
        ratio, scale_K = trials[best]
        gain = losses[best] / losses[0] if losses[0] > 0 else 1.0
        return replace(site, scale_K=scale_K, notes={**site.notes, "ratio": ratio, "loss_against_unscaled": gain})

    def _loss(self, site: Site, moments: list[Tensor], scale_K: Tensor) -> float:
        """Output error summed over the consumers that will be rounded."""
        consumers = zip(site.consumers, site.grids, moments, strict=True)
        return math.fsum(self._layer_loss(layer, grid, h_KK, scale_K) for layer, grid, h_KK in consumers if grid is not None)

    def _layer_loss(self, layer: Layer, grid: Grid, h_KK: Tensor, scale_K: Tensor) -> float:
        scaled_NK = layer.weight_NK.float() * scale_K
        if layer.mask_NK is not None:
            scaled_NK = scaled_NK * layer.mask_NK
        importance_K = h_KK.diagonal() / scale_K.square() if self.clip == "hessian" else None
        search = Search(kind="minmax" if self.clip == "none" else "mse", steps=12, shrink=0.55, refits=0)
        params = grid.fit(scaled_NK, importance_K, None, search)
        error_NK = (grid.decode(grid.encode(scaled_NK, params), params) - scaled_NK) / scale_K
        return math.fsum(float((d * (d @ h_KK)).sum(dtype=torch.float64)) for d in torch.split(error_NK, ROWS))


def _scale(magnitude_K: Tensor, ratio: float) -> Tensor:
    """magnitude^ratio, normalised so that the largest and the smallest are reciprocal; dead channels count as small."""
    floor = magnitude_K[magnitude_K > 0].min()
    powers = magnitude_K.clamp(min=floor).pow(ratio).clamp_(min=1e-4)
    return powers / (powers.max() * powers.min()).sqrt()
