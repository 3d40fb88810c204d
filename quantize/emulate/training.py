"""FP4 training, emulated: stochastic rounding, random Hadamard transforms, and a linear product whose gradients use both.

    stochastic    x lies between two numbers a < b of a grid:   a with probability (b - x) / (b - a), else b,   so E[Q(x)] = x
    Hadamard      (x D H) (w D H)^T = x w^T     H orthonormal, D random signs: outliers are spread over their block

Rounding to nearest is biased: small gradients round to zero, every step, and are lost. Random rounding is right on average and
noisier. The transform makes both factors nearly normal before they are rounded, and cancels in the product. Gradients rounded
at random and transforms on the factors of each product are what lets four-bit floats train (Tseng et al. 2025,
arXiv 2502.20586, for MXFP4; later studies of NVFP4 agree, and prefer ue5m3 to e4m3 for its scales).

Everything is float32 here; no four-bit unit is used, and nothing is faster.

Shape legend: M tokens, N out features, K in features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.quantize.codes import Codes, Grid, Params, quantized
from aerogel.quantize.formats.affine import Affine
from aerogel.quantize.grids import IntGrid
from aerogel.quantize.hadamard import BLOCK, hadamard, random_signs
from aerogel.quantize.tables import TableGrid

__all__ = ["BLOCK", "hadamard", "random_signs", "rounded_product", "stochastic", "train_product"]


def check_random(grid: Grid) -> None:
    """Raises `BadInput` for a grid that is neither integers nor a single table, between whose numbers one could choose."""
    one = isinstance(grid, TableGrid) and not grid.learned and len(grid.tables) == 1
    if not (one or isinstance(grid, IntGrid | Affine)):
        raise _not_random(grid)


def stochastic(grid: Grid, w_NK: Tensor, params: Params, generator: torch.Generator) -> Codes:
    """Codes rounded at random, right on average wherever a weight lies within its grid. The generator is a CPU's, so that the
    same seed gives the same codes on every device.

    Raises:
        BadInput: a grid that is neither integers nor a single table.
    """
    N, K = w_NK.shape
    if isinstance(grid, IntGrid | Affine):
        scale, zero = _spread(params.scale_NG.float(), grid, N, K), params.zero_NG
        units = w_NK.float() / scale + (0 if zero is None else _spread(zero.float(), grid, N, K))
        lower = torch.floor(units)
        up = torch.rand(units.shape, generator=generator).to(units.device) < units - lower
        least, most, kind = 0, (1 << grid.bits) - 1, torch.uint8
        if isinstance(grid, IntGrid):
            least, most, kind = grid.q_min, grid.q_max, torch.int8
        values = (lower + up).clamp_(least, most).to(kind)
        return Codes.of(values, params, grid)
    if not isinstance(grid, TableGrid) or params.table_TE is None or len(params.table_TE) > 1:
        raise _not_random(grid)
    numbers, codes = torch.sort(params.table_TE[0], stable=True)
    known = numbers.isfinite() & torch.cat([numbers[:1].isfinite(), numbers[1:] > numbers[:-1]])
    numbers, codes = numbers[known].contiguous(), codes[known]
    units = w_NK.float() / _spread(params.effective_scale(), grid, N, K)
    place = (torch.searchsorted(numbers, units, right=True) - 1).clamp_(0, len(numbers) - 2)
    low, high = numbers[place], numbers[place + 1]
    up = torch.rand(units.shape, generator=generator).to(units.device) < (units - low) / (high - low)
    return Codes.of(codes[place + up].to(torch.uint8), params, grid)


def _not_random(grid: Grid) -> BadInput:
    return BadInput(f"rounding: stochastic needs integers or one table, found {grid}; write rounding: nearest")


def _spread(scale: Tensor, grid: Grid, N: int, K: int) -> Tensor:
    size = min(grid.group_size or K, K)
    rows = torch.arange(N, device=scale.device) // (grid.shared_rows or N)
    return scale[rows].repeat_interleave(size, 1)[:, :K]


def rounded_product(
    x_MK: Tensor, w_NK: Tensor, grid: Grid, generator: torch.Generator, *, random: bool = False, transform: bool = True
) -> Tensor:
    """x W^T with both factors rounded to `grid`, float32 [M, N].

    random: round x at random (for gradients); weights and activations are rounded to nearest.
    transform: mix the inner dimension first, where `BLOCK` divides it.
    """
    K = x_MK.shape[1]
    if transform and K % BLOCK == 0:
        signs = random_signs(K, generator).to(x_MK.device)
        x_MK, w_NK = hadamard(x_MK, signs), hadamard(w_NK, signs)
    w = quantized(grid, w_NK, grid.fit(w_NK)).decode()
    params = grid.fit(x_MK)
    x = stochastic(grid, x_MK, params, generator) if random else quantized(grid, x_MK, params)
    return x.decode() @ w.T


class _Product(torch.autograd.Function):
    """y = x w^T; all three products of a training step rounded, straight through the rounding."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, w_NK: Tensor, grid: Grid, generator: torch.Generator, random: bool) -> Tensor:
        ctx.save_for_backward(x_MK, w_NK)
        ctx.how = (grid, generator)
        ctx.random = random
        return rounded_product(x_MK, w_NK, grid, generator)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (g_MN,) = gradients
        x_MK, w_NK = ctx.saved_tensors
        dx_MK = rounded_product(g_MN, w_NK.T.contiguous(), *ctx.how, random=ctx.random)
        dw_NK = rounded_product(g_MN.T.contiguous(), x_MK.T.contiguous(), *ctx.how, random=ctx.random)
        return dx_MK, dw_NK, None, None, None


def train_product(x_MK: Tensor, w_NK: Tensor, grid: Grid, generator: torch.Generator, *, random: bool = True) -> Tensor:
    """x W^T as it is in training with `grid` for every factor of the forward and of both backward products.

    random: round gradients at random; else to nearest, which is what fails.
    """
    found: Tensor = _Product.apply(x_MK, w_NK, grid, generator, random)  # type: ignore[no-untyped-call]
    return found
