"""What kernels share that make another problem of theirs, which the weight-only CUDA kernels solve."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

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

    @classmethod
    def warm(cls, weights: Sequence[tuple[Layout, Problem]], tokens: Sequence[int]) -> None:
        """See `Kernel.warm`."""
        Cuda.warm([(layout, cls.inner(problem)) for layout, problem in weights], tokens)

    @classmethod
    def tune(cls, problem: Problem, tokens: Sequence[int]) -> Tuned | None:
        """See `Kernel.tune`; the step before counts for nothing here."""
        return Cuda.tune(cls.inner(problem), tokens)
