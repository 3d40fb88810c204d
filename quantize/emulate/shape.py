"""Generalized Gaussians: how a trained weight is shaped, what that means for its entropy, and shaping it further (DeepShape).

    p(w) = nu / (2 a Gamma(1/nu)) exp(-(|w| / a)^nu)        nu = 2 is normal, 1 is Laplace, below 1 more is near zero
    fit:  E[w^2] / E[|w|]^2 = Gamma(1/nu) Gamma(3/nu) / Gamma(2/nu)^2, looked up for nu from 0.1 to 3 in steps of 0.01

A code with a fixed step costs as many bits as its entropy if it is entropy coded, and at equal variance that entropy falls
with nu. DeepShape matches histograms: w' = F^-1(rank(w)), F the distribution function of a generalized Gaussian with a smaller
nu and the same variance; ranks and signs stay, large weights grow, small ones shrink. It changes the model, and is followed by
some epochs of training, which is not done here: emulation, to see what there is to gain.

Shape legend: a weight is taken as one run of numbers, whatever its shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from aerogel.errors import BadInput

SHAPES = torch.arange(10, 301, dtype=torch.float64) / 100
"""nu that a fit can find."""


@cache
def _ratios() -> Tensor:
    """E[w^2] / E[|w|]^2 for each of `SHAPES`; falls with nu."""
    log = torch.lgamma(1 / SHAPES) + torch.lgamma(3 / SHAPES) - 2 * torch.lgamma(2 / SHAPES)
    return log.exp()


def fit_shape(w: Tensor) -> float:
    """The nu whose moments a weight has; 0.1 or 3 where it lies outside.

    Raises:
        BadInput: nothing but zeros, or values that are no numbers.
    """
    mean, square = w.double().abs().mean(), w.double().square().mean()
    if not bool(square > 0) or not bool(square.isfinite()):
        raise BadInput("a shape can only be fitted to finite weights that are not all zero")
    ratio = float(square / mean**2)
    return float(SHAPES[int((_ratios() - ratio).abs().argmin())])


def quantile(p: Tensor, shape: float) -> Tensor:
    """|w| below which a share p of a generalized Gaussian of variance 1 lies, float64. p in [0, 1)."""
    from scipy.special import gammaincinv, gammaln

    # P(|w| < x) is the regularised incomplete gamma function P(1 / nu, (x / a)^nu).
    scale = math.exp((gammaln(1 / shape) - gammaln(3 / shape)) / 2)
    return scale * torch.from_numpy(gammaincinv(1 / shape, p.double().numpy()) ** (1 / shape))


def deepshape(w: Tensor, shape: float) -> Tensor:
    """The weight with its histogram matched to a generalized Gaussian of this nu and its own variance; ranks and signs stay.

    Raises:
        BadInput: a nu outside 0.1 to 3.
    """
    if not float(SHAPES[0]) <= shape <= float(SHAPES[-1]):
        raise BadInput(f"nu must lie between {SHAPES[0]:.1f} and {SHAPES[-1]:.0f}, found {shape}")
    flat = w.double().flatten()
    order = flat.abs().argsort(stable=True)
    share = torch.empty_like(flat)
    share[order] = (torch.arange(len(flat), dtype=torch.float64) + 0.5) / len(flat)
    found = quantile(share, shape) * flat.sign()
    found *= flat.square().mean().sqrt() / found.square().mean().sqrt().clamp_min(1e-300)
    return found.to(w.dtype).view_as(w)


@dataclass(frozen=True, kw_only=True)
class Entropy:
    """What a weight costs in codes of one step.

    shape: fitted nu. entropy_bits: of the codes, per weight: what an ideal coder reaches. golomb_bits: of exponential Golomb
    codes of order 0, which need no table. error: |w - step round(w / step)|^2 / |w|^2.
    """

    shape: float
    entropy_bits: float
    golomb_bits: float
    error: float


def entropy_report(w: Tensor, step: float) -> Entropy:
    """Codes round(w / step): their entropy and size. Raises `BadInput` for a step that is not positive."""
    if not step > 0:
        raise BadInput(f"the step must be positive, found {step}")
    codes = torch.round(w.double() / step).long().flatten()
    counts = torch.bincount(codes - codes.min())
    counts = counts[counts > 0]
    share = counts.double() / codes.numel()
    # 0, 1, -1, 2, -2, ... -> 0, 1, 2, 3, 4, ...: a number u takes 2 floor(log2(u + 1)) + 1 bits.
    unsigned = torch.where(codes > 0, 2 * codes - 1, -2 * codes)
    golomb = 2 * torch.floor(torch.log2(unsigned.double() + 1)) + 1
    error = (w.double().flatten() - step * codes).square().sum() / w.double().square().sum()
    return Entropy(
        shape=fit_shape(w),
        entropy_bits=float(-(share * share.log2()).sum()),
        golomb_bits=float(golomb.mean()),
        error=float(error),
    )
