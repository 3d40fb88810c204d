"""HQQ: half-quadratic quantization. No data: scales and zero points that suit the heavy tails of the weights themselves.

Equation (Badri & Shaji 2023, "Half-Quadratic Quantization"): minimise |W - Q|_p^p with p < 1, which cares for the many
small errors and lets a few large ones be large. A helper E stands for the errors that may be large:

    E      <- shrink_p(W - Q, beta),  shrink_p(x) = sign(x) max(|x| - |x|^(p-1) / beta, 0)
    s, z   <- least squares of Q against W - E, beta <- 1.01 beta

The published method moves a floating zero point and keeps the scale: that is what `format: affine` gets (`hqq_floating`).
A compressed-tensors checkpoint stores integer zero points. For them (`format: int`) z is rounded to an integer in the code
range and the scale takes the least-squares step as well; per group a step is kept only where it lowers the p-norm.
Cost: `steps` passes over the weight.

Shape legend: N out features, K in features; G groups, g members of a group, n outputs of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.model.layer import Layer, Need
from aerogel.quantize.codes import Params, refuse_zeros
from aerogel.quantize.formats.affine import Affine
from aerogel.quantize.grids import IntGrid, grouped, quantized, row_chunks
from aerogel.quantize.hqq_floating import fit_floating
from aerogel.quantize.problem import check_weight
from aerogel.quantize.ranges import Search, Step, search_steps
from aerogel.quantize.rtn import known_loss, weight_error

if TYPE_CHECKING:
    from aerogel.quantize.grids import Grid


@dataclass(frozen=True, kw_only=True)
class Hqq:
    """Stage `Layer -> Layer`.

    grid: integers, symmetric, with integer zero points, or with floating ones.
    p, beta, steps: the norm, the first weight of the helper term, the number of alternations.
    signed_scales: let symmetric scales be negative where that puts the longer side of the range to use.
    """

    grid: Grid
    p: float = 0.7
    beta: float = 10.0
    steps: int = 20
    signed_scales: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.grid, IntGrid | Affine):
            raise BadInput("hqq fits integers; write format: affine (as published) or format: int, or method: rtn")
        if not 0 < self.p <= 1 or self.beta <= 0 or self.steps < 1:
            raise BadInput(f"hqq needs 0 < p <= 1, beta > 0, steps >= 1, found {self.p}, {self.beta}, {self.steps}")

    @property
    def needs(self) -> frozenset[Need]:
        """No statistics."""
        return frozenset()

    def __call__(self, layer: Layer) -> Layer:
        """The layer with codes. Pruned weights stay zero."""
        check_weight(layer, "hqq")
        w_NK = layer.weight_NK.float()
        if isinstance(self.grid, Affine):
            refuse_zeros(layer.mask_NK, "integers with a floating zero point")
            params = fit_floating(self.grid, w_NK, self.p, self.beta, self.steps)
        else:
            params = self._integer_params(w_NK, layer.mask_NK)
        codes = quantized(self.grid, w_NK if layer.mask_NK is None else w_NK * layer.mask_NK, params)
        weight_NK = codes.decode()
        return layer.with_(
            weight_NK=weight_NK, codes=codes, loss=known_loss(layer, weight_NK), notes=weight_error(layer, weight_NK)
        )

    def _integer_params(self, w_NK: Tensor, mask_NK: Tensor | None) -> Params:
        """Scales and integer zero points of a weight."""
        N, K = w_NK.shape
        size = min(self.grid.group_size or K, K)
        parts = [self._fit(grouped(rows.T, size)) for rows in row_chunks(w_NK, mask_NK)]
        return self.grid.params(Step.join(parts, lambda chunks: torch.cat(chunks, 1)), N, K)

    def _fit(self, w_Ggn: Tensor) -> Step:
        """Scales of one chunk, [G, n]."""
        # The full range in both signs: a search by p-norm over narrower ones would sacrifice every large weight.
        search = Search(kind="mse", norm=self.p, steps=1, signed=self.signed_scales, refits=0)
        now = best = search_steps(w_Ggn, self.grid, search)
        cost = self._cost(w_Ggn, best)
        # The helper works in units of the group's range, so that beta means the same for every layer.
        unit = w_Ggn.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
        beta = self.beta
        for _ in range(self.steps):
            error = (w_Ggn - self._snap(w_Ggn, now)) / unit
            helper = error.sign() * (error.abs() - error.abs().pow(self.p - 1) / beta).clamp_(min=0)
            now = self._least_squares(w_Ggn, w_Ggn - helper * unit, now)
            new_cost = self._cost(w_Ggn, now)
            wins = new_cost < cost
            best, cost = best.where(wins, now), torch.where(wins, new_cost, cost)
            beta *= 1.01
        return best

    def _least_squares(self, w_Ggn: Tensor, aim_Ggn: Tensor, step: Step) -> Step:
        """Scale and integer zero point that bring the present codes closest to `aim`."""
        units = self._snap(w_Ggn, step) / step.scale[:, None]
        if isinstance(step.low, Tensor) and isinstance(step.high, Tensor):
            # mean(q - aim / s) is the published zero point; the codes carry the old one already.
            shift = (units - aim_Ggn / step.scale[:, None]).mean(1)
            # From the old zero point z the new one is z + shift, rounded, and kept in the range of codes.
            shift = self._integers().integer_shift(shift, step)
            step = step._replace(low=step.low - shift, high=step.high - shift)
            units = self._snap(w_Ggn, step) / step.scale[:, None]
        stiffness = units.square().sum(1)
        wanted = torch.where(stiffness > 0, (units * aim_Ggn).sum(1) / stiffness, step.scale)
        return step._replace(scale=self.grid.store(wanted))

    def _integers(self) -> IntGrid:
        """The grid, which `__post_init__` has checked to be one of integers."""
        if not isinstance(self.grid, IntGrid):
            raise BadInput("hqq fits integer grids")
        return self.grid

    def _snap(self, w_Ggn: Tensor, step: Step) -> Tensor:
        return self.grid.snap(w_Ggn, step.each(lambda x: x[:, None]))

    def _cost(self, w_Ggn: Tensor, step: Step) -> Tensor:
        return (self._snap(w_Ggn, step) - w_Ggn).abs_().pow_(self.p).sum(1)
