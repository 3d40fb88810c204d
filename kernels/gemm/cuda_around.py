"""What kernels share that make another problem of theirs, which the weight-only CUDA kernels solve."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from aerogel.kernels.cuda.sources import Wanted
from aerogel.kernels.gemm.cuda import Cuda
from aerogel.kernels.problem import Kernel, Layout, Problem, Tuned


class AroundCuda(Kernel):
    """A kernel whose work but for a step before it is `Cuda`'s on the problem `inner`, and so are compiling and tuning."""

    rows: ClassVar[int] = Cuda.rows
    shared: ClassVar[frozenset[str]] = Cuda.shared

    @staticmethod
    @abstractmethod
    def inner(problem: Problem) -> Problem:
        """The matmul that is left for `Cuda`."""

    @staticmethod
    def operand(x_MK: Tensor, layout: Layout, problem: Problem) -> Tensor:
        """x as the matmul takes it: what the step before makes of it. By default x."""
        return x_MK

    @classmethod
    def run(cls, x_MK: Tensor, layout: Layout, problem: Problem, bias_N: Tensor | None = None) -> Tensor:
        """The step before, then one call of the operator."""
        return Cuda.run(cls.operand(x_MK, layout, problem), layout, cls.inner(problem), bias_N)

    @classmethod
    def wanted(cls, weights: Sequence[tuple[Layout, Problem]], tokens: Sequence[int], device: torch.device) -> list[Wanted]:
        """See `Kernel.wanted`."""
        return Cuda.wanted([(layout, cls.inner(problem)) for layout, problem in weights], tokens, device)

    @classmethod
    def tune(cls, problem: Problem, tokens: Sequence[int]) -> Tuned | None:
        """See `Kernel.tune`; the step before counts for nothing here."""
        return Cuda.tune(cls.inner(problem), tokens)
