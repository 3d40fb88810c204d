"""The best values of the kept weights on a fixed mask: least squares, row by row.

Equation: each output minimises (x - w) H (x - w)^T over x that is zero off its mask S, so H_SS x_S = (H w)_S. Every row has
its own mask and so its own matrix; factoring N of them costs K^3 each. Conjugate gradients need only products with the
one H all rows share: a step for all rows is one matrix product and some elementwise work. Preconditioned by the diagonal
and started from the values at hand, the loss of a row falls with every step and never rises; a row is as good as exact
when its residual is `TOLERANCE` of what it was.
Cost: N K^2 multiply-adds per step, some tens of steps.

Shape legend: N out features, K in features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.quantize.problem import ROWS

TOLERANCE = 1e-3
MOST_STEPS = 200


def refit_rows(
    w_NK: Tensor, h_KK: Tensor, mask_NK: Tensor, start_NK: Tensor, *, tolerance: float = TOLERANCE
) -> tuple[Tensor, int]:
    """The refitted weight, float32 [N, K], zero off the mask, and the most steps that any run of rows took.

    w_NK is the dense weight to imitate; start_NK where to begin, zero off the mask. h_KK must be positive definite.
    """
    fitted, steps = [], 0
    for first in range(0, len(w_NK), ROWS):
        rows = slice(first, first + ROWS)
        x_NK, taken = _solve(w_NK[rows], h_KK, mask_NK[rows].to(h_KK.dtype), start_NK[rows], tolerance)
        fitted.append(x_NK)
        steps = max(steps, taken)
    return torch.cat(fitted), steps


def _solve(w_NK: Tensor, h_KK: Tensor, mask_NK: Tensor, x_NK: Tensor, tolerance: float) -> tuple[Tensor, int]:
    """Conjugate gradients on all rows at once; a converged row stands still."""
    inverse_K = 1 / h_KK.diagonal()
    x_NK = x_NK.clone()
    residual = ((w_NK - x_NK) @ h_KK).mul_(mask_NK)
    direction = residual * inverse_K
    power = (residual * direction).sum(1)
    goal = tolerance**2 * power
    for step in range(MOST_STEPS):
        active = power > goal
        if not bool(active.any()):
            return x_NK, step
        curved = (direction @ h_KK).mul_(mask_NK)
        length = torch.where(active, power / (direction * curved).sum(1), 0.0)[:, None]
        x_NK.addcmul_(length, direction)
        residual.addcmul_(length, curved, value=-1)
        steered = residual * inverse_K
        new_power = (residual * steered).sum(1)
        turn = torch.where(active, new_power / power, 0.0)[:, None]
        direction = steered.addcmul_(turn, direction)
        power = torch.where(active, new_power, power)
    return x_NK, MOST_STEPS
