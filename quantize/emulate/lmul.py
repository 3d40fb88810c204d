"""L-Mul, emulated: a product of floats by one addition of integers.

    x y = s_x s_y 2^(e_x + e_y) (1 + m_x + m_y + m_x m_y)   ~   s_x s_y 2^(e_x + e_y) (1 + m_x + m_y + 2^-l(m))

The product of the mantissas is replaced by a constant (Luo and Sun 2024, arXiv 2410.00907): l(m) = m up to 3 mantissa bits, 3
for 4, 4 beyond. In bits that is: add the fields of exponent and mantissa as integers, subtract the bias once, add the
constant, xor the signs. Where the mantissas add up to 1 or more the integer addition carries into the exponent, and what
remains counts double; this is what hardware would do, and `carry=False` is the formula read literally, which is worse.

On hardware made for it an addition costs a fraction of the energy of a product; those are estimates, and here nothing is
faster: every product below is computed element by element. What can be measured is what it does to a model.

Shape legend: M tokens, N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from aerogel.errors import BadInput

DIGITS = 23
"""Mantissa bits of float32."""
BIAS, TOP = 127, 255
CHUNK = 1 << 22
"""Products made at a time."""
NAME = "aerogel_lmul"
"""The emulated attention's name among transformers' implementations."""


def offset_exponent(mantissa: int) -> int:
    """l(m)."""
    return mantissa if mantissa <= 3 else 3 if mantissa == 4 else 4


def rounded(x: Tensor, mantissa: int) -> Tensor:
    """x with its mantissa rounded to that many bits (ties to even), the exponent's range that of float32."""
    if not 1 <= mantissa <= DIGITS:
        raise BadInput(f"mantissa must lie between 1 and {DIGITS} bits, found {mantissa}")
    drop = DIGITS - mantissa
    if drop == 0:
        return x.float()
    bits = x.float().contiguous().view(torch.int32)
    half = (1 << (drop - 1)) - 1 + ((bits >> drop) & 1)
    found = ((bits + half) & ~((1 << drop) - 1)).view(torch.float32)
    return torch.where(x.isfinite(), found, x.float())


def lmul(x: Tensor, y: Tensor, mantissa: int = 3, *, carry: bool = True) -> Tensor:
    """The emulated product of two tensors that broadcast, float32.

    Args:
        x, y: floats, rounded to `mantissa` bits first.
        mantissa: bits of both, 1 to 23.
        carry: let sums of mantissas carry into the exponent, as adding the fields does; else the formula as it is written.

    Returns:
        0 where a factor is 0 or the exponent falls below the range, infinity above it; products with what is not finite are
        the ordinary ones.
    """
    x, y = rounded(x, mantissa), rounded(y, mantissa)
    x, y = x + torch.zeros_like(y), y + torch.zeros_like(x)
    if not carry:
        (mx, ex), (my, ey) = torch.frexp(x.abs()), torch.frexp(y.abs())
        value = torch.ldexp(2 * mx + 2 * my - 1 + 2.0 ** -offset_exponent(mantissa), ex + ey - 2)
    else:
        drop = DIGITS - mantissa
        fields = (x.abs().contiguous().view(torch.int32) >> drop) + (y.abs().contiguous().view(torch.int32) >> drop)
        fields = fields - (BIAS << mantissa) + (1 << mantissa >> offset_exponent(mantissa))
        finite = fields.clamp(0, TOP << mantissa).to(torch.int32) << drop
        value = finite.view(torch.float32).masked_fill(fields < 1 << mantissa, 0)
    value = value.masked_fill((x == 0) | (y == 0), 0) * torch.sign(x) * torch.sign(y)
    return torch.where(x.isfinite() & y.isfinite(), value, x * y)


def lmul_matmul(x_MK: Tensor, w_NK: Tensor, mantissa: int = 3) -> Tensor:
    """x W^T with emulated products and exact sums, float32 [..., M, N]; leading dimensions are batches of both."""
    M = x_MK.shape[-2]
    step = max(1, CHUNK // max(1, w_NK.numel()))
    rows = [
        lmul(x_MK[..., start : start + step, None, :], w_NK[..., None, :, :], mantissa).sum(-1) for start in range(0, M, step)
    ]
    return torch.cat(rows, -2)


def lmul_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Attention as transformers calls it, [B, heads, T, d] -> [B, T, heads, d], both its products emulated.

    Raises:
        BadInput: an attention with sinks, caps or dropout in training, which is not emulated.
    """
    strange = sorted(name for name in ("s_aux", "softcap", "head_mask") if options.get(name) is not None)
    if strange or (module.training and options.get("dropout")):
        raise BadInput(f"L-Mul is emulated for plain attention only, this one wants {', '.join(strange) or 'dropout'}")
    mantissa: int = _MANTISSA[0]
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = lmul_matmul(query, key, mantissa) * (scaling or query.shape[-1] ** -0.5)
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    share = scores.softmax(-1)
    found = lmul_matmul(share, value.transpose(-1, -2), mantissa)
    return found.transpose(1, 2).to(query.dtype).contiguous(), share


_MANTISSA = [3]


@contextmanager
def emulating(model: nn.Module, mantissa: int = 3) -> Iterator[None]:
    """Inside, the attention of a transformers model multiplies by L-Mul. Raises `BadInput` for a model that has none."""
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "_attn_implementation"):
        raise BadInput(f"a {type(model).__name__} has no attention of transformers to replace")
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask

    ALL_ATTENTION_FUNCTIONS.register(NAME, lmul_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, eager_mask)
    before, _MANTISSA[0] = (config._attn_implementation, _MANTISSA[0]), mantissa
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation, _MANTISSA[0] = before
