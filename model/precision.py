"""How finely float32 products multiply: the one place that touches torch's process-wide setting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def coarse_products(wanted: bool = True) -> Iterator[None]:
    """Lets float32 products round their factors to bfloat16 where that is faster.

    Exact where the factors are bfloat16 values anyway, as activations of a bfloat16 model are; elsewhere for what is only
    reported. Not `wanted`: nothing changes.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if wanted else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
