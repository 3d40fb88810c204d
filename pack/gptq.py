"""Reads GPTQ checkpoints (AutoGPTQ, GPTQModel, auto-round's export), versions 1 and 2.

    qweight  int32 [K*b/32, N]   u packed along K, dense little-endian (3 bits straddle words)
    qzeros   int32 [G, N*b/32]   zero points packed along N; version 1 stores z - 1, version 2 stores z
    scales   float16 [G, N]
    g_idx    int32 [K]           the group of each column; not k // group_size when columns were sorted (desc_act)

    W[n, k] = (u[k, n] - z[g_idx[k], n]) * scales[g_idx[k], n]

On our grid q = u - 2^(b-1), and z likewise, which changes nothing in the difference. In version 1 a stored 2^b - 1 means
zero point 0, as in the code that wrote such files (the sum is taken modulo 2^b).

Shape legend: N out features, K in features, G groups along K.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.pack import bits
from aerogel.pack.format import SCALE_DTYPES, take
from aerogel.pack.scheme import NOT_SERVED, NotServed, Scheme
from aerogel.pack.source import Columns, Source, arranged, integer_grid, scale_dtype
from aerogel.quantize.grids import IntGrid


class Gptq(Source):
    """A `quantization_config` with `quant_method: gptq`."""

    suffixes: frozenset[str] = frozenset({"qweight", "qzeros", "scales", "g_idx"})
    markers: ClassVar[frozenset[str]] = frozenset({"qweight"})
    index: ClassVar[str] = "g_idx"

    def __init__(self, config: Mapping[str, Any]) -> None:
        layout = str(config.get("checkpoint_format") or config.get("format") or "gptq")
        if layout not in ("gptq", "gptq_v2"):
            raise NotServed(f"GPTQ checkpoint_format {layout!r} is {NOT_SERVED}, only gptq and gptq_v2")
        if str(config.get("pack_dtype") or "int32").removeprefix("torch.") != "int32":
            raise NotServed(f"GPTQ pack_dtype {config['pack_dtype']!r} is {NOT_SERVED}, only int32")
        self._offset = 1 if layout == "gptq" else 0
        self._base = _scheme(config, {})
        self._overrides = [
            (_expression(pattern), _scheme(config, override))
            for pattern, override in (config.get("dynamic") or {}).items()
            if not str(pattern).startswith("-:")
        ]

    def scheme(self, names: Sequence[str], header: Mapping[str, torch.dtype], class_names: Sequence[str]) -> Scheme:
        """The first `dynamic` rule that matches the name, else the config's own numbers."""
        chosen = next((s for rule, s in self._overrides if any(rule.match(name) for name in names)), self._base)
        return chosen.with_scale_dtype(scale_dtype(header, "scales", names[0]))

    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Columns:
        """The codes of one weight, columns sorted by group where g_idx is not in order."""
        grid = integer_grid(scheme)
        b = grid.bits
        packed = tensors["qweight"]
        index = tensors.get("g_idx")
        K = len(index) if index is not None and len(index) else packed.shape[0] * bits.WORD_BITS // b
        N, groups = packed.shape[1], grid.groups(K)
        take(tensors, "qweight", (bits.words(K, b), N), (torch.int32,))
        values = bits.unsigned_to_signed(bits.unpack_rows(packed, b, K).T.contiguous(), b)
        scale = take(tensors, "scales", (groups, N), SCALE_DTYPES).T.contiguous()
        stored = bits.unpack(take(tensors, "qzeros", (groups, bits.words(N, b)), (torch.int32,)), b, N)
        zero = self._zero(stored, grid)
        return arranged(values, scale, zero, grid, index if index is not None and len(index) else None)

    def _zero(self, stored_GN: Tensor, grid: IntGrid) -> Tensor | None:
        """Signed zero points [N, G]; None for a symmetric grid, whose zero points are checked to be the middle."""
        middle = 1 << (grid.bits - 1)
        if grid.symmetric:
            # Tools disagree about the version in their own symmetric files; the middle is the only value that makes sense.
            if not bool(((stored_GN == middle - 1) | (stored_GN == middle)).all()):
                raise BadInput("the GPTQ config says sym: true, but zero points are not all the middle; write sym: false")
            return None
        unsigned = (stored_GN + self._offset) & ((1 << grid.bits) - 1)
        return bits.unsigned_to_signed(unsigned.T.contiguous(), grid.bits)


def _scheme(config: Mapping[str, Any], override: Mapping[str, Any]) -> Scheme:
    merged = {**config, **(override or {})}
    width, group = int(merged.get("bits", 4)), int(merged.get("group_size", 128))
    if width not in (2, 3, 4, 8):
        raise NotServed(f"GPTQ with {width} bits is {NOT_SERVED}, only 2, 3, 4 and 8")
    grid = IntGrid(
        bits=width,
        group_size=group if group > 0 else None,
        symmetric=bool(merged.get("sym", True)),
        scale_dtype=torch.float16,
    )
    return Scheme(format="pack-quantized", grid=grid)


def _expression(pattern: str) -> re.Pattern[str]:
    """The regular expression of a `dynamic` key, which may begin with `+:`."""
    try:
        return re.compile(str(pattern).removeprefix("+:"))
    except re.error as error:
        raise BadInput(f"the GPTQ 'dynamic' pattern {pattern!r} is not a regular expression ({error}); correct it") from error
