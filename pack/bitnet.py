"""BitNet checkpoints: ternary weights, four to a byte, as transformers stores them.

    weight         uint8 [N/4, K]     row r holds the outputs r, r + N/4, r + 2N/4, r + 3N/4 in its pairs of bits,
                                      lowest first; a pair is the code plus one
    weight_scale   [1]                bitlinear: the weight is code / weight_scale; autobitlinear: code * weight_scale

They become integers of two bits with one scale per output (all the same, in float32), which every integer kernel runs.
These models are trained with inputs rounded to int8; here inputs stay exact, which moves the output by about the half
percent that the rounding costs. Models that normalise the input of every linear, or round weights as they run (`online`),
are left to transformers.

Shape legend: N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.pack.format import SCALE_DTYPES, take
from aerogel.pack.scheme import NOT_SERVED, NotServed, Scheme
from aerogel.pack.source import Columns, Source, integer_grid
from aerogel.quantize.codes import Codes
from aerogel.quantize.grids import IntGrid

PER_BYTE = 4


class Bitnet(Source):
    """A `quantization_config` with `quant_method: bitnet`."""

    suffixes: frozenset[str] = frozenset({"weight", "weight_scale"})
    markers: ClassVar[frozenset[str]] = frozenset({"weight_scale"})
    index: ClassVar[str] = "weight_g_idx"

    def __init__(self, config: Mapping[str, Any]) -> None:
        if config.get("use_rms_norm"):
            raise NotServed(f"BitNet with use_rms_norm, a norm inside every linear, is {NOT_SERVED}")
        if config.get("quantization_mode", "offline") != "offline":
            raise NotServed(f"BitNet with quantization_mode {config['quantization_mode']!r} is {NOT_SERVED}, only offline")
        self._divides = config.get("linear_class", "bitlinear") == "bitlinear"

    def scheme(self, names: Sequence[str], header: Mapping[str, torch.dtype], class_names: Sequence[str]) -> Scheme:
        """Integers of two bits with one scale per output. Raises `BadInput` where the weight is not packed."""
        if header.get("weight") != torch.uint8:
            raise BadInput(
                f"{names[0]} has a weight_scale, but its weight is not packed in uint8; this is no BitNet checkpoint"
            )
        return Scheme(format="pack-quantized", grid=IntGrid(bits=2, scale_dtype=torch.float32))

    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Columns:
        """The codes of one weight."""
        packed = tensors["weight"].to(torch.uint8)
        scale = take(tensors, "weight_scale", (1,), SCALE_DTYPES).float()
        values_NK = unpack_rows(packed)
        if int(values_NK.max()) > 1:
            raise BadInput("a BitNet weight holds the code 3, which means nothing; the file is damaged")
        if not bool(scale.isfinite().all()) or (self._divides and bool(scale == 0)):
            raise BadInput(f"a BitNet weight_scale is {float(scale)}; the file is damaged")
        one = scale.reciprocal() if self._divides else scale
        N = values_NK.shape[0]
        return Columns(Codes(values_NK=values_NK, scale_NG=one.expand(N, 1).contiguous(), grid=integer_grid(scheme)))


def unpack_rows(packed: Tensor) -> Tensor:
    """Codes int8 [4 R, K] of bytes uint8 [R, K]."""
    return torch.cat([((packed >> 2 * i) & 3).to(torch.int8) - 1 for i in range(PER_BYTE)])


def encode(codes: Codes, name: str) -> dict[str, Tensor]:
    """The tensors of a ternary weight with one scale, as `bitlinear` reads them: what multiplies with 1 / weight_scale.

    Raises:
        BadInput: codes beyond -1 .. 1, scales that differ, or outputs that are not a multiple of four.
    """
    values_NK, grid = codes.values_NK, codes.grid
    N = values_NK.shape[0]
    scales = codes.effective_scale()
    if not isinstance(grid, IntGrid) or grid.bits != 2 or codes.zero_NG is not None or int(values_NK.min()) < -1:
        raise BadInput(f"{name} is not ternary, so it is no BitNet weight; compress with format: ternary, scales: tensor")
    if not bool((scales == scales[0, 0]).all()):
        raise BadInput(f"{name} has several scales, BitNet has one per weight; compress with format: ternary, scales: tensor")
    if N % PER_BYTE:
        raise BadInput(f"{name} has {N} outputs; BitNet's packing needs a multiple of {PER_BYTE}")
    parts = torch.split((values_NK + 1).to(torch.uint8), N // PER_BYTE)
    packed = parts[0].clone()
    for i, part in enumerate(parts[1:], 1):
        packed |= part << 2 * i
    return {"weight": packed, "weight_scale": scales[0, :1].reciprocal()}
