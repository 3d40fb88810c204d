"""The matmul with a packed weight, said plainly: decode it, multiply in float32. What every kernel is tested against.

    W_NK = (q - z) * s                      exact codes, float32 product
    x'   = x                                activations: none
    x'   = s_x * round(x / s_x)             int8: s_x = max|x| / 127 over a token
    x'   = s_x * e4m3(x / s_x)              fp8:  s_x = max|x| / 448 over a token, or over 128 columns of a token
                                            static: s_x is stored, and what exceeds the largest code is cut off
    y_MN = x'_MK @ W_NK.T + bias_N

Cost: 2 M N K operations and a dense float32 copy of W on every call. It refuses nothing and is never fast.

Shape legend: M tokens, N out features, K in features.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.kernels.problem import Kernel, Layout, Problem
from aerogel.quantize.grids import BLOCK, E4M3_MAX

INT8_MAX = 127.0
"""The input's grid is symmetric, -127..127: its largest value then lies on the grid. Servers do the same."""


class Reference(Kernel):
    """Plain float32 torch on any device."""

    about: ClassVar[str] = "decode to float32 and multiply; the specification, runs everything, slow"
    traceable: ClassVar[bool] = False

    @staticmethod
    def refuses(problem: Problem) -> str | None:
        """Nothing."""
        return None

    @staticmethod
    def run(x_MK: Tensor, layout: Layout, problem: Problem, bias_N: Tensor | None = None) -> Tensor:
        """See the module's text."""
        weight = problem.stored.decode(layout, problem.grid, torch.float32)
        y_MN = round_input(x_MK.float(), problem, layout.get("input_scale")) @ weight.T
        if bias_N is not None:
            y_MN += bias_N.float()
        return y_MN.to(x_MK.dtype)


def round_input(x_MK: Tensor, problem: Problem, fixed: Tensor | None = None) -> Tensor:
    """The input as the multiplication sees it, float32 [M, K]. fixed: float32 [1], where activations are static."""
    if problem.activations == "none":
        return x_MK
    if problem.activations.endswith("-static") and fixed is None:
        raise BadInput(f"activations: {problem.activations} needs the stored input_scale, and there is none")
    if problem.activations.startswith("int8"):
        values, scale = quantize_int8(x_MK, fixed)
        return values.float() * scale
    if problem.grid.group_size is None:
        values, scale = quantize_fp8(x_MK, fixed)
        return values.float() * scale
    K = x_MK.shape[1]
    blocks = torch.nn.functional.pad(x_MK, (0, -K % BLOCK)).reshape(x_MK.shape[0], -(-K // BLOCK), BLOCK)
    values, scale = quantize_fp8(blocks)
    return (values.float() * scale).flatten(1)[:, :K]


def quantize_int8(x: Tensor, fixed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """int8 values and float32 scales [..., 1] over the last dimension: x ~ values * scale; an all-zero row has scale 1.
    fixed: float32 [1], the scale of every row. A row with an infinity or a NaN has a scale that is not finite, fixed or not."""
    scale = _scales(x, INT8_MAX, fixed)
    return (x.float() / scale).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8), scale


def quantize_fp8(x: Tensor, fixed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """e4m3 values and float32 scales [..., 1] over the last dimension, as `quantize_int8`."""
    scale = _scales(x, E4M3_MAX, fixed)
    return (x.float() / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def _scales(x: Tensor, largest: float, fixed: Tensor | None) -> Tensor:
    peak = x.abs().amax(-1, keepdim=True).float()
    # By a tensor: on CUDA torch multiplies by the rounded reciprocal of a plain number, one bit off the quotient.
    own = torch.where(peak == 0, torch.ones_like(peak), peak / torch.full_like(peak, largest))
    return own if fixed is None else torch.where(peak.isfinite(), fixed, own)
