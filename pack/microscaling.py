"""NVFP4, MXFP4 and MXFP8 as compressed-tensors stores them, so that servers load them.

    nvfp4-pack-quantized   weight_packed        uint8 [N, ceil(K/2)]      two e2m1 codes a byte, the even column low
                           weight_scale         float8_e4m3fn [N, G]      groups of 16
                           weight_global_scale  float32 [1]               a divisor: W = f * (scale / global)
    mxfp4-pack-quantized   weight_packed        as above
                           weight_scale         uint8 [N, G]              groups of 32, scale = 2^(u - 127)
    mxfp8-quantized        weight               float8_e4m3fn [N, K]
                           weight_scale         uint8 [N, G]              the same

The global scale that we write is a power of two, the reciprocal of our factor: both readings, scale / global and scale *
factor, then give the same bits. Other writers' globals are no powers of two; their reciprocal is rounded once to float32.
The width is not stored: K must be even for the packed ones, and is what the bytes say.

Shape legend: N out features, K in features, G groups along K.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.pack.arguments import arguments
from aerogel.pack.format import MATMUL_TOLERANCE, Activations, Format, Grid, Shapes, Tolerance, take, with_bias
from aerogel.pack.scheme import NOT_SERVED, NotServed, weight_only
from aerogel.quantize.codes import Codes
from aerogel.quantize.formats.mx import Mx
from aerogel.quantize.formats.nvfp4 import Nvfp4
from aerogel.quantize.tables import TableGrid


class _Microscaling(Format):
    """What the three have in common. A subclass names its grid and whether two codes share a byte."""

    tolerance: ClassVar[Tolerance] = MATMUL_TOLERANCE
    grid: ClassVar[TableGrid]
    stored_scale: ClassVar[torch.dtype] = torch.uint8

    @classmethod
    def refuses(cls, grid: Grid, activations: Activations = "none") -> str | None:
        """Only the one grid of the format, weight-only."""
        if grid != cls.grid:
            return f"{cls.name} stores {cls.grid}; use pack-quantized for integers, table-packed for other tables"
        return weight_only(cls.name, activations)

    @classmethod
    def encode(cls, codes: Codes) -> dict[str, Tensor]:
        """The tensors of the file. Raises `BadInput` for codes on another grid."""
        cls._check(codes.grid)
        tensors = {"weight_scale": codes.scale_NG.contiguous().view(cls.stored_scale)}
        if cls.grid.bits == 8:
            return {"weight": codes.values_NK.contiguous().view(torch.float8_e4m3fn), **tensors}
        if codes.values_NK.shape[1] % 2:
            raise _odd(cls.name, codes.values_NK.shape[1])
        tensors["weight_packed"] = codes.values_NK[:, ::2] | codes.values_NK[:, 1::2] << 4
        if cls.grid.two_level and codes.factor is not None:
            tensors["weight_global_scale"] = (1 / codes.factor).reshape(1)
        return tensors

    @classmethod
    def to_codes(cls, tensors: Mapping[str, Tensor], grid: Grid) -> Codes:
        """The codes back. Raises `BadInput` when shapes or dtypes do not agree."""
        cls._check(grid)
        local = "weight" if cls.grid.bits == 8 else "weight_packed"
        held = tensors.get(local)
        if held is None or held.dim() != 2:
            raise BadInput(f"a {cls.name} linear needs a matrix {local!r}; the config does not belong to this file")
        N, K = held.shape[0], held.shape[1] * (8 // cls.grid.bits)
        found = {name: take(tensors, name, shape, (dtype,)) for name, (shape, dtype) in cls.shapes(N, K, grid).items()}
        values = found[local].view(torch.uint8)
        if cls.grid.bits == 4:
            values = unpack_pairs(values)
        divisor = found.get("weight_global_scale")
        return Codes(
            values_NK=values,
            scale_NG=found["weight_scale"].view(cls.grid.scale_dtype),
            table_TE=cls.grid.tables.to(values.device),
            factor=None if divisor is None else (1 / divisor).reshape(()),
            grid=grid,
        )

    @classmethod
    def shapes(cls, N: int, K: int, grid: Grid, has_bias: bool = False, dtype: torch.dtype | None = None) -> Shapes:
        """Names, shapes and dtypes of `encode`'s tensors for an [N, K] weight; no data is touched."""
        cls._check(grid)
        found: Shapes = {"weight_scale": ((N, grid.groups(K)), cls.stored_scale)}
        if cls.grid.bits == 8:
            found["weight"] = ((N, K), torch.float8_e4m3fn)
        elif K % 2:
            raise _odd(cls.name, K)
        else:
            found["weight_packed"] = ((N, K // 2), torch.uint8)
        if cls.grid.two_level:
            found["weight_global_scale"] = ((1,), torch.float32)
        return with_bias(found, N, has_bias, dtype or torch.float32)

    @classmethod
    def rows(cls, tensors: Mapping[str, Tensor], grid: Grid, start: int, stop: int) -> dict[str, Tensor]:
        """The tensors of output rows start..stop, as views."""
        return {name: tensor if name == "weight_global_scale" else tensor[start:stop] for name, tensor in tensors.items()}

    @classmethod
    def describe(cls, grid: Grid) -> dict[str, Any]:
        """Floats of so many bits with a scale of a byte for each group."""
        return arguments(
            num_bits=cls.grid.bits,
            type="float",
            strategy="tensor_group" if cls.grid.two_level else "group",
            group_size=cls.grid.group_size,
            scale_dtype=str(cls.stored_scale),
            observer="memoryless_minmax",
        )

    @classmethod
    def parse(cls, weights: Mapping[str, Any]) -> Grid:
        """The grid, once the numbers of the config agree."""
        said = (weights.get("num_bits"), weights.get("type"), weights.get("group_size"))
        if said != (cls.grid.bits, "float", cls.grid.group_size):
            raise NotServed(f"{cls.name} with bits, type and group {said} is {NOT_SERVED}")
        return cls.grid

    @classmethod
    def _check(cls, grid: Grid) -> None:
        if grid != cls.grid:
            raise BadInput(f"{cls.name} stores {cls.grid}, not {grid}; write pack: {{format: auto}}")


class Nvfp4Packed(_Microscaling):
    """NVFP4, a layout of compressed-tensors."""

    name: ClassVar[str] = "nvfp4-pack-quantized"
    names: ClassVar[frozenset[str]] = frozenset({"weight_packed", "weight_scale", "weight_global_scale"})
    grid: ClassVar[TableGrid] = Nvfp4()
    stored_scale: ClassVar[torch.dtype] = torch.float8_e4m3fn


class Mxfp4Packed(_Microscaling):
    """MXFP4, a layout of compressed-tensors."""

    name: ClassVar[str] = "mxfp4-pack-quantized"
    names: ClassVar[frozenset[str]] = frozenset({"weight_packed", "weight_scale"})
    grid: ClassVar[TableGrid] = Mx()


class Mxfp8(_Microscaling):
    """MXFP8, a layout of compressed-tensors."""

    name: ClassVar[str] = "mxfp8-quantized"
    names: ClassVar[frozenset[str]] = frozenset({"weight", "weight_scale"})
    grid: ClassVar[TableGrid] = Mx(kind="e4m3")


def unpack_pairs(packed: Tensor) -> Tensor:
    """Bytes [N, K / 2] of two codes each, the even column low -> uint8 codes [N, K]."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)


def _odd(name: str, K: int) -> BadInput:
    return BadInput(f"{name} stores two columns in a byte and no width, and K is {K}; write pack: {{format: table-packed}}")
