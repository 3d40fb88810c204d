"""Ternary weights: -s, 0 or +s. Integers of two bits that never use the fourth code, so that every integer kernel runs them.

BitNet b1.58 (Ma et al. 2024, arXiv 2402.17764) and the MatMul-free language models (Zhu et al. 2024, arXiv 2406.02528) train
with one scale for a whole matrix, the mean magnitude, and codes clip(round(W / s), -1, 1). On a model that was not trained
so this loses far too much; one scale per group, found by search, is the best that three values can do without training
(on a Gaussian: error 0.19 of the weight's size, against 0.26 with the mean magnitude).

Cost: 2 bits as stored, 1.6 with five codes in a byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.quantize.codes import Params
from aerogel.quantize.grids import IntGrid
from aerogel.quantize.ranges import Search


@dataclass(frozen=True, kw_only=True)
class Ternary(IntGrid):
    """Ternary: integers -1, 0, 1.

    bits: 2, the codes as they are stored.
    symmetric: true, there are no zero points.
    group_size: inputs that share a scale; null for one scale per output.
    scale_dtype: type that scales are stored in, and rounded to before use.
    scales: `searched` for the least error; `absmean`, the mean magnitude of each group; `tensor`, that of the whole weight.
    """

    bits: int = 2
    symmetric: bool = True
    scales: Literal["searched", "absmean", "tensor"] = "searched"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits != 2 or not self.symmetric:
            raise BadInput("ternary codes have bits: 2 and symmetric: true")
        if self.scales not in ("searched", "absmean", "tensor"):
            raise BadInput(f"scales must be searched, absmean or tensor, found {self.scales!r}")
        if self.scales == "tensor" and self.group_size is not None:
            raise BadInput("scales: tensor is one scale for the whole weight; write group_size: null")

    @property
    def q_min(self) -> int:
        """The smallest code."""
        return -1

    def fit(
        self,
        w_NK: Tensor,
        importance: Tensor | None = None,
        mask_NK: Tensor | None = None,
        search: Search | str = "minmax",
        curvature_KK: Tensor | None = None,
    ) -> Params:
        """Scales; with `absmean` and `tensor` the data and the search change nothing."""
        if self.scales == "searched":
            return super().fit(w_NK, importance, mask_NK, search, curvature_KK)
        N, K = w_NK.shape
        kept = (w_NK if mask_NK is None else w_NK * mask_NK).abs().float()
        size = min(self.group_size or K, K)
        sums_NG = torch.nn.functional.pad(kept, (0, -K % size)).reshape(N, -1, size).sum(-1)
        counts_G = torch.full((self.groups(K),), size, device=w_NK.device)
        counts_G[-1] = K - size * (self.groups(K) - 1)
        scale = sums_NG.sum().div(N * K).expand(N, 1) if self.scales == "tensor" else sums_NG / counts_G
        return Params(scale_NG=self.store(scale.clone()).to(self.scale_dtype))
