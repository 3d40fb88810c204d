"""Reads AWQ checkpoints in the `gemm` layout (AutoAWQ and its exporters).

    qweight  int32 [K, N/8]   4-bit u packed along N, eight to a word
    qzeros   int32 [G, N/8]   zero points, packed the same way; stored as they are (no offset)
    scales   float16 [G, N]

    W[n, k] = (u[k, n] - z[g, n]) * scales[g, n],  g = k // group_size

The eight codes of a word are interleaved: nibble j holds column 8c + [0, 2, 4, 6, 1, 3, 5, 7][j], the order in which a
GPU's half2 arithmetic wants them.

Shape legend: N out features, K in features, G groups along K.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.pack import bits
from aerogel.pack.format import SCALE_DTYPES, take
from aerogel.pack.scheme import NOT_SERVED, NotServed, Scheme
from aerogel.pack.source import Columns, Source, arranged, integer_grid, scale_dtype
from aerogel.quantize.grids import IntGrid

NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where column 8c + i of a word stands: the inverse of [0, 2, 4, 6, 1, 3, 5, 7]."""


class Awq(Source):
    """A `quantization_config` with `quant_method: awq`."""

    suffixes: frozenset[str] = frozenset({"qweight", "qzeros", "scales"})
    markers: ClassVar[frozenset[str]] = frozenset({"qweight"})
    index: ClassVar[str] = "g_idx"

    def __init__(self, config: Mapping[str, Any]) -> None:
        layout = str(config.get("version") or config.get("format") or "gemm").lower()
        width = int(config.get("bits", config.get("w_bit", 4)))
        group = int(config.get("group_size", config.get("q_group_size", 128)))
        if layout != "gemm" or width != 4:
            raise NotServed(f"AWQ version {layout!r} with {width} bits is {NOT_SERVED}, only gemm with 4")
        symmetric = not bool(config.get("zero_point", True))
        grid = IntGrid(bits=width, group_size=group if group > 0 else None, symmetric=symmetric, scale_dtype=torch.float16)
        self._base = Scheme(format="pack-quantized", grid=grid)

    def scheme(self, names: Sequence[str], header: Mapping[str, torch.dtype], class_names: Sequence[str]) -> Scheme:
        """The config's numbers: AWQ has one scheme for all weights; only scales differ, when they are not float16."""
        return self._base.with_scale_dtype(scale_dtype(header, "scales", names[0]))

    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Columns:
        """The codes of one weight."""
        grid = integer_grid(scheme)
        K, words = tensors["qweight"].shape
        N, groups = words * 8, grid.groups(K)
        unsigned = _columns(take(tensors, "qweight", (K, words), (torch.int32,)))
        scale = take(tensors, "scales", (groups, N), SCALE_DTYPES).T.contiguous()
        zero = None
        if not grid.symmetric:
            stored = _columns(take(tensors, "qzeros", (groups, words), (torch.int32,)))
            zero = bits.unsigned_to_signed(stored.T.contiguous(), 4)
        return arranged(bits.unsigned_to_signed(unsigned.T.contiguous(), 4), scale, zero, grid, None)


def _columns(packed: Tensor) -> Tensor:
    """int32 [R, N/8] -> uint8 [R, N] with the interleaving undone."""
    nibbles = bits.unpack(packed, 4, packed.shape[1] * 8)
    order = torch.tensor(NIBBLE_OF_COLUMN, device=packed.device)
    return nibbles.reshape(len(nibbles), packed.shape[1], 8)[:, :, order].flatten(1)
