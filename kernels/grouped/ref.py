"""The grouped matmul said plainly: decode each expert that is wanted, multiply its rows in float32.

What every grouped kernel is tested against. Cost: a dense float32 copy of one expert at a time. It refuses nothing.

Shape legend: E experts, M rows of x, S pairs of token and expert, N out features, K in features.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from aerogel.kernels.gemm.ref import Reference as One
from aerogel.kernels.grouped.kernel import Grouped, Routes
from aerogel.kernels.problem import Kernel, Layout, Problem


class Reference(Grouped):
    """Plain float32 torch on any device."""

    about: ClassVar[str] = "decode one expert after another to float32 and multiply; the specification, slow"
    traceable: ClassVar[bool] = False
    base: ClassVar[type[Kernel]] = One

    @staticmethod
    def run(
        x_MK: Tensor, expert_S: Tensor, routes: Routes, layout: Layout, problem: Problem, bias_EN: Tensor | None = None
    ) -> Tensor:
        """See `Grouped.run`."""
        experts, pairs = next(iter(layout.values())).shape[0], expert_S.shape[0]
        y_SN = x_MK.new_zeros(pairs, problem.N)
        each = max(1, pairs // max(1, x_MK.shape[0]))
        for e in sorted(set(expert_S.tolist())):
            if e < experts:
                chosen = (expert_S == e).nonzero()[:, 0]
                one = {name: tensor[e] for name, tensor in layout.items()}
                bias_N = None if bias_EN is None else bias_EN[e]
                rows = x_MK[torch.div(chosen, each, rounding_mode="floor")]
                y_SN[chosen] = One.run(rows, one, problem, bias_N)
        return y_SN
