"""The types a scale can be stored in, and rounding to them. A scale is rounded before any code is chosen.

    float16, bfloat16, float32    ordinary floats, either sign
    float8_e4m3fn                 eight bits, 2^-9 .. 448; NVFP4 keeps it in range with a float32 factor per tensor
    float8_e8m0fnu                a power of two, 2^-127 .. 2^127 (OCP microscaling formats)
    uint8                         ue5m3, unsigned with five exponent and three mantissa bits, 2^-17 .. 114688, code 255 is NaN

Eight-bit scales are positive and rounded to the nearest in value; larger ones than the type's largest become the largest.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from aerogel.errors import BadInput

WIDE = (torch.float16, torch.bfloat16, torch.float32)
TYPES: dict[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "e4m3": torch.float8_e4m3fn,
    "e8m0": torch.float8_e8m0fnu,
    "ue5m3": torch.uint8,
}
"""Name in a recipe or a config -> the dtype of the stored tensor."""

LARGEST_CODE = {torch.float8_e4m3fn: 126, torch.float8_e8m0fnu: 254, torch.uint8: 254}
"""The byte of the largest finite number of each eight-bit type. Below it the numbers rise with their bytes."""

DIGITS = {torch.float8_e4m3fn: 3, torch.float8_e8m0fnu: 0, torch.uint8: 3}
"""Mantissa bits of the eight-bit types."""


def name_of(dtype: torch.dtype) -> str:
    """The name of a scale's dtype. Raises `BadInput` for one that no scale is stored in."""
    found = next((name for name, known in TYPES.items() if known == dtype), None)
    if found is None:
        raise BadInput(f"scale_dtype must be one of {', '.join(TYPES)}, found {str(dtype).removeprefix('torch.')}")
    return found


def check_wide(dtype: torch.dtype) -> None:
    """Raises `BadInput` for a type that is not an ordinary float."""
    if dtype not in WIDE:
        known = ", ".join(str(t).removeprefix("torch.") for t in WIDE)
        raise BadInput(f"scale_dtype must be one of {known}, found {str(dtype).removeprefix('torch.')}")


def numbers_of_byte(dtype: torch.dtype) -> Tensor:
    """The 256 numbers of an eight-bit type by their byte, float32 on the CPU; NaN where a byte is none."""
    byte = torch.arange(256, dtype=torch.uint8)
    if dtype != torch.uint8:
        return byte.view(dtype).float()
    exponent, mantissa = (byte >> 3).double(), (byte & 7).double()
    normal = torch.exp2(exponent - 15) * (1 + mantissa / 8)
    numbers = torch.where(exponent > 0, normal, mantissa * 2.0**-17).float()
    numbers[255] = torch.nan
    return numbers


@cache
def _positive(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The numbers of an eight-bit type in the order of their bytes, and the middles between neighbours."""
    numbers = numbers_of_byte(dtype)[: LARGEST_CODE[dtype] + 1].to(device)
    return numbers, numbers[:-1] * 0.5 + numbers[1:] * 0.5


@cache
def _least(dtype: torch.dtype) -> int:
    """The smallest byte that is not zero; from the CPU, since asking a GPU would wait for it."""
    return int(float(numbers_of_byte(dtype)[0]) == 0)


def scale_values(scale: Tensor) -> Tensor:
    """Stored scales as float32 numbers."""
    if scale.dtype == torch.uint8 and not scale.is_meta:
        return numbers_of_byte(torch.uint8).to(scale.device)[scale.long()]
    return scale.float()


def readable(scale: Tensor, signed: bool = False) -> Tensor:
    """Stored scales for a reader that decodes eight bits by shifts, which take NaN for a number.

    The same tensor, or the same values in bfloat16 where one is NaN, and where eight bits have no sign but should have one.
    """
    if scale.dtype in WIDE:
        return scale
    nan = LARGEST_CODE[scale.dtype] + 1
    has_sign = scale.dtype == torch.float8_e4m3fn
    byte = scale.view(torch.uint8)
    found = bool(((byte & 127 if has_sign else byte) == nan).any())
    return scale_values(scale).bfloat16() if found or (signed and not has_sign) else scale


def unread(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `readable`, of scales that have no sign: in the stored type."""
    if scale.dtype == dtype or dtype in WIDE:
        return scale
    numbers, value = numbers_of_byte(dtype)[: LARGEST_CODE[dtype] + 1], scale.float()
    return torch.bucketize(value.nan_to_num(nan=torch.inf), numbers).to(torch.uint8).view(dtype)


def as_stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales that `rounded` has seen in the stored type; exact."""
    if dtype in WIDE:
        return scale.to(dtype)
    return _nearest_byte(scale, dtype).view(dtype)


def rounded(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to `dtype` and back; 0 becomes 1, what would underflow becomes the smallest number of the type.

    Raises:
        BadInput: beyond the range of float16.
    """
    if dtype not in WIDE:
        numbers, _ = _positive(dtype, scale.device)
        found = numbers[_nearest_byte(scale, dtype).long()].to(scale.dtype)
        return found.masked_fill_(scale == 0, 1.0)
    if dtype is torch.float16 and bool((scale.abs() > torch.finfo(dtype).max).any()):
        raise BadInput("a weight is too large for scale_dtype float16; write scale_dtype: bfloat16")
    nearest = scale.to(dtype).to(scale.dtype)
    lost = (nearest == 0) & (scale != 0)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    nearest = torch.where(lost, torch.full_like(scale, smallest), nearest)
    return nearest.masked_fill_(scale == 0, 1.0)


def _nearest_byte(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8; never the byte of zero."""
    _, middles = _positive(dtype, scale.device)
    least = _least(dtype)
    return torch.bucketize(scale.float().abs().contiguous(), middles).clamp_(min=least).to(torch.uint8)
