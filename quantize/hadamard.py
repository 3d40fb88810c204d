"""Random Hadamard transforms: a rotation that spreads what is loud over its block, and that costs additions.

    x D H        D random signs, H orthonormal, +-1 / sqrt(block) in Sylvester's order, one block after the other

H is symmetric and its own inverse, so that x D H H D = x.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from aerogel.errors import BadInput

BLOCK = 32
"""Values that a transform mixes unless told otherwise."""


def hadamard(x: Tensor, signs: Tensor, block: int = BLOCK) -> Tensor:
    """x D H along the last dimension, in runs of `block` values (a power of two); orthonormal. `hadamard(I)` is its matrix.

    Raises:
        BadInput: a block that is no power of two, or does not divide the dimension.
    """
    check_block(x.shape[-1], block)
    if signs.shape != x.shape[-1:]:
        raise BadInput(f"a Hadamard transform of {x.shape[-1]} values needs as many signs, found {list(signs.shape)}")
    return _mixed(x * signs.to(x.dtype), block)


def inverse(x: Tensor, signs: Tensor, block: int) -> Tensor:
    """x H D, which takes `hadamard` back. Raises `BadInput` as `hadamard` does."""
    back: Tensor = hadamard(x, torch.ones_like(signs), block) * signs.to(x.dtype)
    return back


def _mixed(x: Tensor, block: int) -> Tensor:
    """x H: small dense products, which on every device are one launch."""
    mixed: Tensor = x.reshape(-1, block) @ matrix(block, x.device).to(x.dtype)
    return mixed.reshape(x.shape)


@cache
def matrix(block: int, device: torch.device) -> Tensor:
    """H, float32 [block, block]."""
    one = torch.ones(1, 1)
    while len(one) < block:
        one = torch.cat([torch.cat([one, one], 1), torch.cat([one, -one], 1)])
    found: Tensor = (one * block**-0.5).to(device)
    return found


def check_block(size: int, block: int) -> None:
    """Raises `BadInput` for a block that is no power of two, or does not divide `size`."""
    if block < 1 or block & (block - 1) or size % block:
        largest = size & -size
        instead = f"write transform_block: {largest} or less" if largest > 1 else "no block does: add the weight to ignore"
        raise BadInput(
            f"a Hadamard transform of {size} values needs a power of two as block that divides them, found {block}; {instead}"
        )


def random_signs(size: int, generator: torch.Generator) -> Tensor:
    """float32 [size] of -1 and 1."""
    return torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1
