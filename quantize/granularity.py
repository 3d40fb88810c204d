"""How many inputs should share a scale, decided for each matrix: FineQuant's rule.

A scale for a whole output row costs nothing and serves most matrices; where a few weights are far out, they set the range of
everything in their row, and only smaller groups confine them. FineQuant (Kim et al. 2023, arXiv 2308.09723) starts with a scale
per output and halves the group as long as that shrinks the range:

    r(g) = mean over weights of the max |w| of their group of g         accept g / 2 while r(g / 2) < (1 - gain) r(g)

Ranges shrink with any halving, even of normal weights, since the largest of fewer numbers is smaller: by 4 to 8 % between
groups of 4096 and 64. `gain` must lie above that, so that what is paid for is a range which a few weights had set. The paper's
own threshold is not published in a form that we could check; ours is measured, see docs/methods/finequant.md. No data needed.

The threshold has no relation to what a halving costs, and that can be had. Codes of b bits on a range r have steps of r / 2^b:
a range that shrinks to a share x is worth -log2 x bits, and halving g costs scale bits / g. So `worth` halves as long as

    log2(r(g) / r(g / 2)) > scale bits / g

which spends a bit on scales only where it buys more than a bit of codes would. For normal weights and 16-bit scales that ends
between 128 and 64; heavier tails end lower.

Shape legend: N out features, K in features, g inputs of a group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from aerogel.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Granularity:
    """How the group size is decided.

    granularity: `fixed` is `group_size` everywhere; `adaptive` starts with one scale per output and halves a matrix's groups,
        down to `group_size`, while that shrinks their mean range by more than `granularity_gain` (FineQuant); `worth` halves
        while the range shrinks by more than the scales cost. Linears of one module with inputs of the same width (q, k, v;
        gate, up; experts) get the smallest that one of them needs.
    granularity_gain: see granularity; a share of the range per halving.
    """

    granularity: Literal["fixed", "adaptive", "worth"] = "fixed"
    granularity_gain: float = 0.08

    def __post_init__(self) -> None:
        if not 0 < self.granularity_gain < 1:
            raise BadInput(f"granularity_gain must be a share between 0 and 1, found {self.granularity_gain}")

    def group_size(self, w_NK: Tensor, smallest: int, scale_bits: int = 16) -> int | None:
        """The group size for a weight [N, K]: `smallest` times a power of two, or None for a scale per output."""
        K = w_NK.shape[1]
        size, held = K, mean_range(w_NK, K)
        for smaller in candidates(K, smallest):
            found = mean_range(w_NK, smaller)
            if self.granularity == "worth":
                share = 2.0 ** -(scale_bits / smaller - scale_bits / size)
            else:
                share = (1 - self.granularity_gain) ** math.log2(size / smaller)
            if not found < held * share:
                break
            size, held = smaller, found
        return None if size == K else size


def candidates(K: int, smallest: int) -> list[int]:
    """Group sizes to try for K inputs, falling: `smallest` times powers of two, at most half of K."""
    sizes = [smallest]
    while 4 * sizes[-1] <= K:
        sizes.append(2 * sizes[-1])
    return [size for size in reversed(sizes) if 2 * size <= K]


def mean_range(w_NK: Tensor, size: int) -> float:
    """Mean over weights of the largest magnitude in their group of `size` inputs; a short last group counts for its share."""
    K = w_NK.shape[1]
    peak_NG = torch.nn.functional.pad(w_NK.abs(), (0, -K % size)).view(w_NK.shape[0], -1, size).amax(2)
    total = peak_NG.sum(dtype=torch.float64) * size - peak_NG[:, -1].sum(dtype=torch.float64) * (-K % size)
    return float(total / w_NK.numel())
