"""Scales of eight bits as the CUDA kernels read them: one byte for each group, and nothing wider beside it.

    e8m0    the byte itself: 2^(u - 127); the kernels take byte 0 for 0, and bytes up to MOST_E8M0
    e4m3    the same number as e5m3 without subnormals: byte 8 e + m is 2^(e - 10) (1 + m / 8), byte 0 is 0

e4m3 is rewritten because its subnormals would cost every kernel instructions on every group: what is 2^-9 * m there becomes an
ordinary number here, since 18 binades fit into five bits of exponent. A kernel then makes a 16-bit float of a byte with one
multiplication and addition of integers: the byte moved to the top of the mantissa, and a difference of exponent biases.

Shape legend: any.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.quantize.scales import numbers_of_byte

E5M3 = torch.uint8
"""The dtype of rewritten e4m3 scales."""
E8M0 = torch.float8_e8m0fnu
BYTES = (E5M3, E8M0)
STORED = (torch.float8_e4m3fn, torch.float8_e8m0fnu)
"""Types of stored scales that have a byte here."""
BIAS = 10
MOST_E8M0 = 136
"""Scales up to 2^9 leave room in a bfloat16 for what the kernels multiply them with; a trained weight's are below 1."""


def numbers_of_e5m3() -> Tensor:
    """The numbers that the 256 bytes stand for, float32."""
    byte = torch.arange(256)
    numbers = torch.exp2((byte >> 3).float() - BIAS) * (1 + (byte & 7) / 8)
    numbers[:8] = 0
    return numbers


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """e4m3 byte -> e5m3 byte and back, uint8 [256] each; 0 where there is no such number."""
    ours, theirs = numbers_of_e5m3(), numbers_of_byte(torch.float8_e4m3fn)[:127]
    there = torch.zeros(256, dtype=torch.uint8)
    there[1:127] = torch.tensor([int((ours == number).nonzero()) for number in theirs[1:]], dtype=torch.uint8)
    back = torch.zeros(256, dtype=torch.uint8)
    back[there[1:127].long()] = torch.arange(1, 127, dtype=torch.uint8)
    return there.to(device), back.to(device)


def tile_bytes(scale: Tensor) -> Tensor | None:
    """Stored scales, e4m3 or e8m0, as the kernels' bytes: `E5M3` or `E8M0`. None for e8m0 scales too large for them.

    Raises:
        BadInput: a scale that is negative or NaN; a scale is a positive number.
    """
    raw = scale.view(torch.uint8)
    if scale.is_meta:
        return scale if scale.dtype == E8M0 else raw
    largest = int(raw.max()) if raw.numel() else 0
    if largest > (254 if scale.dtype == E8M0 else 126):
        raise BadInput(
            f"a scale in {str(scale.dtype).removeprefix('torch.')} is negative or no number; quantize this weight again"
        )
    if scale.dtype == E8M0 and largest > MOST_E8M0:
        return None
    return scale if scale.dtype == E8M0 else _tables(scale.device)[0][raw.long()]


def stored_bytes(scale: Tensor) -> Tensor:
    """The inverse of `tile_bytes`."""
    return scale if scale.dtype == E8M0 else _tables(scale.device)[1][scale.long()].view(torch.float8_e4m3fn)


def tile_numbers(scale: Tensor) -> Tensor:
    """Scales of a tile layout, of any type, as float32."""
    return numbers_of_e5m3().to(scale.device)[scale.long()] if scale.dtype == E5M3 else scale.float()
