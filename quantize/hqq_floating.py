"""HQQ as published: the scale stays that of the range, and a floating zero point moves.

    Q     <- clamp(round(W / s + z), 0, 2^b - 1),   R = (Q - z) s
    E     <- shrink_p(W - R, beta)
    z     <- mean over the group of Q - (W - E) / s,   beta <- 1.01 beta

until the mean of |W - R| over the whole weight falls no further, 20 times at most (Badri & Shaji 2023, and the authors' library
hqq 0.2.8, whose numbers these are, rounding the first zero point at 4 bits included). beta is in the weights' own units there:
with beta 10 and p 0.7 an error below 0.17 is shrunk to nothing, so that E is 0 for the weights of most models, and what runs is
rounding and averaging in turn.

Other than there, scales and zero points are rounded to their stored type before the last codes are chosen, a short last group
counts its own members only, and a group that is all but constant is one number instead of having a scale with a floor.

Shape legend: N out features, K in features, G groups along K, g members of a group, n outputs of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.quantize.codes import Params, grouped, row_chunks
from aerogel.quantize.formats.affine import Affine
from aerogel.quantize.ranges import Step

ROUNDED_AT = 4
"""Bits at which the first zero point is a whole number."""
FARTHEST = 1 << 15
"""Steps between zero and a group, from which on the group counts as constant: float16 holds zero points up to twice that."""


def fit_floating(grid: Affine, w_NK: Tensor, p: float, beta: float, steps: int) -> Params:
    """Scales and zero points of a weight, as stored. p, beta, steps: as `Hqq` has them."""
    N, K = w_NK.shape
    size = min(grid.group_size or K, K)
    inside_Gg1 = torch.arange(grid.groups(K) * size, device=w_NK.device).reshape(-1, size, 1) < K
    chunks = [grouped(rows.T, size) for rows in row_chunks(w_NK, None)]
    found = [_range(grid, w_Ggn, inside_Gg1) for w_Ggn in chunks]
    least = torch.inf
    for _ in range(steps):
        error = 0.0
        for i, (w_Ggn, (scale, zero)) in enumerate(zip(chunks, found, strict=True)):
            moved, wrong = _moved(grid, w_Ggn, inside_Gg1, scale, zero, p, beta)
            found[i] = (scale, moved)
            error += wrong
        if error >= least:
            break
        least, beta = error, beta * 1.01
    parts = [grid.step_of(grid.store(scale), zero) for scale, zero in found]
    return grid.params(Step.join(parts, lambda parts: torch.cat(parts, 1)), N, K)


def _range(grid: Affine, w_Ggn: Tensor, inside_Gg1: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point that span each group, [G, n]."""
    low = w_Ggn.masked_fill(~inside_Gg1, torch.inf).amin(1)
    high = w_Ggn.masked_fill(~inside_Gg1, -torch.inf).amax(1)
    size = torch.maximum(low.abs(), high.abs())
    flat = (high - low) * FARTHEST <= size * grid.largest
    scale = torch.where(flat, torch.where(size == 0, torch.ones_like(size), size), (high - low) / grid.largest)
    zero = -low / scale
    return scale, zero.round() if grid.bits == ROUNDED_AT else zero


def _moved(
    grid: Affine, w_Ggn: Tensor, inside_Gg1: Tensor, scale: Tensor, zero: Tensor, p: float, beta: float
) -> tuple[Tensor, float]:
    """The next zero point [G, n], and the sum of |W - R| with the present one."""
    units = w_Ggn / scale[:, None]
    codes = (units + zero[:, None]).round_().clamp_(0, grid.largest)
    error = (w_Ggn - (codes - zero[:, None]) * scale[:, None]).mul_(inside_Gg1)
    far = error.abs()
    helper = error.sign() * (far - far.pow(p - 1) / beta).clamp_(min=0)
    shift = codes.sub_(units).add_(helper.div_(scale[:, None]))
    return shift.mul_(inside_Gg1).sum(1) / inside_Gg1.sum(1), float(far.sum(dtype=torch.float64))
