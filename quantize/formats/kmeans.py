"""Codebooks: every output has a table of its own, fitted to its weights by k-means in which loud inputs count more.

Kim et al. 2023 (SqueezeLLM, arXiv 2306.07629): weights of one row are clustered into 2^b numbers that minimise

    sum_k f_k (w_k - c(w_k))^2

with f the diagonal of the Fisher information there, which `clip: fisher` of `rtn` and `gptq` brings (`model/gradients.py`), or
another importance: the mean square of input k (`rtn` with `weighted: true`), or 1 / (H^-1)_kk, what an error there costs after
all other inputs have adapted (`gptq`). These two need no gradients.
No scale and no group: a table of float16 costs 2^b * 16 / K bits per weight, which is little for wide layers (0.06 at
K = 4096 and 4 bits) and more than groups take where K is small (0.44 at K = 576).

Lloyd's iteration in one dimension, all rows at once: nearest number by binary search, then weighted means. Where it begins
matters more than how long it runs: from equally spaced quantiles the tails get too few numbers, and 50 rounds leave a fifth
more error than 10 rounds from the density that is optimal for many numbers (`start`).
Cost: `rounds` passes over the weight. Zero is a number of the table only where weights were pruned; then the number
nearest to it becomes 0.

Shape legend: N out features, K in features, n rows of a chunk, E = 2^bits numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.quantize.codes import Params, row_slices
from aerogel.quantize.levels import Levels
from aerogel.quantize.ranges import Search
from aerogel.quantize.scales import check_wide
from aerogel.quantize.tables import TableGrid


@dataclass(frozen=True, kw_only=True)
class KMeans(TableGrid):
    """Codebooks: a table for every output, fitted by weighted k-means.

    bits: 2 to 8.
    rounds: of Lloyd's iteration.
    group_size: null; a table belongs to a whole output.
    scale_dtype: type that the numbers of the tables are stored in.
    """

    bits: int = 4
    rounds: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_wide(self.scale_dtype)
        if not 2 <= self.bits <= 8:
            raise BadInput(f"bits must lie between 2 and 8, found {self.bits}")
        if self.group_size is not None or self.rounds < 1:
            raise BadInput(f"kmeans wants group_size: null and rounds >= 1, found {self.group_size} and {self.rounds}")

    @property
    def learned(self) -> bool:
        """Yes."""
        return True

    def numbers(self) -> tuple[tuple[float, ...], ...]:
        """None before there is a weight."""
        raise BadInput("the numbers of a codebook are fitted to a weight; there are none before")

    def fit(
        self,
        w_NK: Tensor,
        importance: Tensor | None = None,
        mask_NK: Tensor | None = None,
        search: Search | str = "minmax",
        curvature_KK: Tensor | None = None,
    ) -> Params:
        """Tables for a weight. There is no scale to search, so `search` changes nothing."""
        tables = []
        for rows in row_slices(w_NK):
            w_nK = w_NK[rows].float().contiguous()
            weight_nK = torch.ones_like(w_nK)
            if importance is not None:
                weight_nK = importance[rows].float() if importance.dim() == 2 else importance.float().repeat(len(w_nK), 1)
            if mask_NK is not None:
                w_nK, weight_nK = w_nK * mask_NK[rows], weight_nK * mask_NK[rows]
            table_nE = lloyd(w_nK, weight_nK, start(w_nK, weight_nK, 1 << self.bits), self.rounds)
            if mask_NK is not None:
                nearest = table_nE.abs().argmin(1, keepdim=True)
                table_nE = table_nE.scatter(1, nearest, 0.0)
            tables.append(table_nE)
        table_NE = torch.cat(tables)
        if self.scale_dtype is torch.float16 and float(table_NE.abs().max()) > torch.finfo(torch.float16).max:
            raise BadInput("a weight is too large for scale_dtype float16; write scale_dtype: bfloat16")
        ones = torch.ones(len(w_NK), 1, dtype=self.scale_dtype, device=w_NK.device)
        return Params(scale_NG=ones, table_TE=table_NE.to(self.scale_dtype).float())


def start(w_nK: Tensor, weight_nK: Tensor, E: int) -> Tensor:
    """Numbers to begin with, [n, E]: as dense as the cube root of the density of weights, which is the optimum for many
    numbers (Panter and Dite 1951). A gap d between neighbours that weigh f has the density f / d and so the share
    (f / d)^(1/3) d of the numbers."""
    if w_nK.shape[1] == 1:
        return w_nK.expand(-1, E).clone()
    sorted_nK, order_nK = w_nK.sort(1)
    heavy_nK = weight_nK.gather(1, order_nK)
    gap = sorted_nK.diff(dim=1)
    share = ((heavy_nK[:, 1:] + heavy_nK[:, :-1]).double().pow(1 / 3) * gap.double().pow(2 / 3)).cumsum(1)
    wanted = share[:, -1:] * (torch.arange(E, device=w_nK.device) + 0.5) / E
    places = torch.searchsorted(share, wanted).clamp_(max=share.shape[1] - 1)
    return (sorted_nK[:, 1:] * 0.5 + sorted_nK[:, :-1] * 0.5).gather(1, places)


def lloyd(w_nK: Tensor, weight_nK: Tensor, table_nE: Tensor, rounds: int) -> Tensor:
    """Numbers [n, E], ascending, after so many rounds of weighted k-means from `table_nE`; stops when nothing changes."""
    weighted_nK = w_nK * weight_nK
    for _ in range(rounds):
        levels = Levels.of(table_nE)
        places_nK = levels.places(w_nK)
        total = torch.zeros_like(table_nE).scatter_add_(1, places_nK, weight_nK)
        moved = torch.zeros_like(table_nE).scatter_add_(1, places_nK, weighted_nK) / total
        moved = torch.where(total > 0, moved, levels.numbers)
        if torch.equal(moved, table_nE):
            break
        table_nE = moved
    return table_nE.sort(1).values
