"""The matmul with bit planes on any GPU that Triton compiles for: as rows of one-bit integers (`plane_rows`), sums in float32.

Activations stay in their type, which holds products with 0 and 1 exactly. On NVIDIA GPUs `cuda-planes` reads all planes of a
weight in one product; here each is a set of rows, with as many bytes.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from aerogel.kernels.gemm.plane_rows import PlaneRows
from aerogel.kernels.gemm.triton_linear import Triton
from aerogel.kernels.problem import Kernel, Layout, Problem


class TritonPlanes(PlaneRows):
    """Planes as rows of one-bit integers on the portable kernels."""

    about: ClassVar[str] = "bit planes as rows of one-bit integers, on the Triton kernels for any GPU"
    base: ClassVar[type[Kernel]] = Triton
    dtype: ClassVar[torch.dtype | None] = None

    @classmethod
    def product(cls, x_MK: Tensor, layout: Layout, inner: Problem) -> Tensor:
        """x times the rows of all planes, float32 [M, q N]."""
        return Triton.run(x_MK, layout, inner, wide=True)
