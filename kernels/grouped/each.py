"""Grouped matmuls by the kernel for a single weight, one call for each expert that somebody chose.

What has no grouped kernel of its own runs at the speed of the kernel that a `Linear` of that format has: an expert's weight is
a slice of the stack, so nothing is copied or decoded for it. Which experts were chosen is read back to the host, so no CUDA
graph can record it; a graph of `torch.compile` holds it as one operator.

Shape legend: E experts, M rows of x, S pairs of token and expert, N out features, K in features.
"""

from __future__ import annotations

import functools
from typing import ClassVar

from torch import Tensor

from aerogel.kernels.dispatch import choose
from aerogel.kernels.grouped.kernel import Grouped, Routes, pairs_by_expert
from aerogel.kernels.problem import Kernel, Layout, Problem


@functools.lru_cache(maxsize=1024)
def single(problem: Problem) -> type[Kernel]:
    """The kernel that runs one expert."""
    return choose(problem)[1]


class Each(Grouped):
    """One call of another kernel for each active expert."""

    about: ClassVar[str] = "the kernel for a single weight of the format, one call for each active expert; runs everything"
    traceable: ClassVar[bool] = False

    @classmethod
    def base_of(cls, problem: Problem) -> type[Kernel]:
        """The first that a single weight would have."""
        return single(problem)

    @classmethod
    def refuses(cls, problem: Problem) -> str | None:
        """Nothing."""
        return None

    @staticmethod
    def run(
        x_MK: Tensor, expert_S: Tensor, routes: Routes, layout: Layout, problem: Problem, bias_EN: Tensor | None = None
    ) -> Tensor:
        """See `Grouped.run`."""
        kernel, experts = single(problem), len(next(iter(layout.values())))
        y_SN = x_MK.new_zeros(len(expert_S), problem.N)
        each = max(1, len(expert_S) // max(1, len(x_MK)))
        for e, places in pairs_by_expert(expert_S, experts).items():
            one = {name: tensor[e] for name, tensor in layout.items()}
            bias_N = None if bias_EN is None else bias_EN[e]
            if len(places) == 1:  # all there is when one sequence is decoded; indexing by lists takes longer
                s = places[0]
                y_SN[s] = kernel.run(x_MK[s // each : s // each + 1], one, problem, bias_N)[0]
            else:
                y_SN[places] = kernel.run(x_MK[[s // each for s in places]], one, problem, bias_N)
        return y_SN
