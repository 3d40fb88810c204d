"""Scales of eight bits as the CUDA kernels read them: one byte for each group, and nothing wider beside it.

    e8m0    the byte itself: 2^(u - 127); the kernels take byte 0 for 0, and bytes up to MOST_E8M0
    e4m3    the same number as e5m3 without subnormals: byte 8 e + m is 2^(e - 10) (1 + m / 8), byte 0 is 0
    ue5m3   the same type, a power of two apart

e4m3 is rewritten because its subnormals would cost every kernel instructions on every group: what is 2^-9 * m there becomes an
ordinary number here, since 18 binades fit into five bits of exponent. A kernel then makes a 16-bit float of a byte with one
multiplication and addition of integers: the byte moved to the top of the mantissa, and a difference of exponent biases.
ue5m3 is that already, but for its bias and its subnormals: where all scales of a weight lie within 18 binades, as those of a
trained one do, they move to where e4m3's are, and the weight's factor takes the difference.

Shape legend: any.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.quantize.scales import LARGEST_CODE, numbers_of_byte

E5M3 = torch.uint8
"""The dtype of rewritten e4m3 scales."""
E8M0 = torch.float8_e8m0fnu
BYTES = (E5M3, E8M0)
UE5M3 = torch.uint8
"""The dtype of stored ue5m3 scales."""
STORED = (torch.float8_e4m3fn, torch.float8_e8m0fnu, UE5M3)
"""Types of stored scales that have a byte here."""
BIAS, UE5M3_BIAS = 10, 15
MOST_EXPONENT = 18
"""Of a byte of `E5M3`: that of 448. The kernels have room for one more."""
SHRINK = 8
"""Floats times such scales are smaller by 2^SHRINK inside the kernels (`SCALED` in decode.cuh), to stay inside their type."""
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


def tile_bytes(scale: Tensor) -> tuple[Tensor, int] | None:
    """Stored scales as the kernels' bytes, `E5M3` or `E8M0`, and the power of two that their numbers lack. None for e8m0
    scales that are too large for them, and for ue5m3 scales too far apart.

    Raises:
        BadInput: a scale that is negative or NaN; a scale is a positive number.
    """
    raw = scale.view(torch.uint8)
    if scale.is_meta:
        return (scale if scale.dtype == E8M0 else raw), 0
    largest = int(raw.max()) if raw.numel() else 0
    if largest > LARGEST_CODE[scale.dtype]:
        raise BadInput(
            f"a scale in {str(scale.dtype).removeprefix('torch.')} is negative or no number; quantize this weight again"
        )
    if scale.dtype == UE5M3:
        down = (largest >> 3) - MOST_EXPONENT
        least = int(raw.min()) if raw.numel() else largest
        inside = least >> 3 > max(down, 0)
        return (raw - 8 * down, down + BIAS - UE5M3_BIAS) if inside else None
    if scale.dtype == E8M0:
        return (scale, 0) if largest <= MOST_E8M0 else None
    return _tables(scale.device)[0][raw.long()], 0


def stored_bytes(scale: Tensor, dtype: torch.dtype, power: int) -> Tensor:
    """The inverse of `tile_bytes`: scales in `dtype`."""
    if dtype == UE5M3:
        return scale + 8 * (power + UE5M3_BIAS - BIAS)
    return scale if dtype == E8M0 else _tables(scale.device)[1][scale.long()].view(torch.float8_e4m3fn)


def unit_of_sums(scale: Tensor, floats: bool, factor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What the kernels multiply sums with after the last product, float32 scalar; None where that is nothing.

    scale: of a tile layout. floats: whether codes are small floats. factor: of all scales. dtype: of the activations.
    """
    if scale.dtype not in BYTES:
        return None
    shrunk = floats and (scale.dtype == E5M3 or dtype == torch.bfloat16)
    return (torch.ones((), device=scale.device) if factor is None else factor) * (2.0**SHRINK if shrunk else 1.0)


def tile_numbers(scale: Tensor) -> Tensor:
    """Scales of a tile layout, of any type, as float32."""
    return numbers_of_e5m3().to(scale.device)[scale.long()] if scale.dtype == E5M3 else scale.float()
