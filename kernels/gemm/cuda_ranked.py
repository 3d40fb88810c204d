"""Configurations of a kernel against each other: each is compared with a product in float32, then timed as a model uses it.

One that is wrong raises: a table must never hold a broken kernel. Shape legend: M tokens, N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from aerogel.errors import RunFailed
from aerogel.kernels.cuda.timing import graph_microseconds
from aerogel.kernels.gemm.cuda_dense import dequantize
from aerogel.kernels.gemm.cuda_weight import TileWeight

C = TypeVar("C")

TOLERANCE = 1e-2
"""Relative Frobenius error against the product in float32; the outputs' own rounding to 16 bits is up to 2e-3."""
SPILLED_BYTES = 64
"""A few registers spilled outside the loop cost nothing that can be measured; more are a sign of a cut that is too large."""


def ranked(
    weights: Sequence[TileWeight],
    configs: Sequence[C],
    M: int,
    dtype: torch.dtype,
    plan: Callable[[TileWeight, C, int, torch.dtype], Any],
) -> list[tuple[C, float]]:
    """Configurations and their microseconds with M tokens, fastest first; those that spill many registers are left out.

    Args:
        weights: one weight and its copies.
        plan: a runner with the `function` that it launches, which has been compiled.

    Raises:
        RunFailed: a configuration whose result is wrong.
    """
    weight = weights[0]
    x_MK = inputs(weight, M, dtype)
    y_MN = torch.empty((M, weight.N), dtype=dtype, device=weight.codes.device)
    given = (x_MK, None, y_MN, *([x_MK] if weight.exact else []))  # outliers' inputs, where they have their own
    wanted = x_MK.float() @ dequantize(weight, dtype).float().T
    found = []
    for config in configs:
        plans = [plan(held, config, M, dtype) for held in weights]
        if plans[0].function.attribute("local_bytes") > SPILLED_BYTES:
            continue
        y_MN.fill_(torch.nan)
        plans[0](*given)
        error = ((y_MN.float() - wanted).norm() / wanted.norm()).item()
        if not error < TOLERANCE:
            raise RunFailed(f"{config} is wrong for {weight.N}x{weight.K} of {weight.bits} bits: relative error {error:.1e}")
        found.append((config, graph_microseconds([partial(run, *given) for run in plans])))
    return sorted(found, key=lambda pair: pair[1])


def inputs(weight: TileWeight, M: int, dtype: torch.dtype) -> Tensor:
    """Random x [M, K]; where it will be rounded to bytes, integers that this leaves as they are."""
    device = weight.codes.device
    if not weight.in_bytes:
        return torch.randn(M, weight.K, device=device).to(dtype)
    x_MK = torch.randint(-127, 128, (M, weight.K), device=device).to(dtype)
    x_MK[:, 0] = 127  # the scale of each token is 1
    return x_MK
