"""Reads gpt-oss checkpoints, `quant_method: mxfp4`: the experts of a layer in blocks of 32, everything else dense.

    NAME_blocks  uint8 [E, N, G, 16]      32 e2m1 codes of a group, two a byte, the even one low
    NAME_scales  uint8 [E, N, G]          scale = 2^(u - 127)

NAME is a parameter of an experts module (`...experts.gate_up_proj`), which holds it as [E, K, N]. These are the numbers of
`mxfp4-pack-quantized` with the groups as an axis of their own, and stay packed as such.

Shape legend: E experts, N out features, K in features, G = K / 32 groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.pack.microscaling import unpack_pairs
from aerogel.pack.scheme import Scheme
from aerogel.pack.source import Columns, Source
from aerogel.quantize.codes import Codes
from aerogel.quantize.formats.mx import GROUP, Mx


class GptOss(Source):
    """A `quantization_config` with `quant_method: mxfp4`. Its other entries say what is not packed, as the tensors do."""

    suffixes: frozenset[str] = frozenset({"blocks", "scales"})
    markers: ClassVar[frozenset[str]] = frozenset({"blocks"})
    index: ClassVar[str] = "g_idx"

    def __init__(self, config: Mapping[str, Any]) -> None:
        del config

    def groups(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """Parameters of experts, each with its two tensors."""
        found: dict[str, dict[str, str]] = {}
        for name in names:
            stem, _, local = name.rpartition("_")
            if local in self.suffixes and ".experts." in name:
                found.setdefault(stem, {})[local] = name
        return {stem: held for stem, held in found.items() if self.markers & held.keys()}

    def scheme(self, names: Sequence[str], header: Mapping[str, torch.dtype], class_names: Sequence[str]) -> Scheme:
        """MXFP4. Raises `BadInput` without scales."""
        if "scales" not in header:
            raise BadInput(f"{names[0]}_blocks has no {names[0]}_scales beside it; the checkpoint is not whole, get it again")
        return Scheme(format="mxfp4-pack-quantized", grid=Mx())

    def read(self, tensors: Mapping[str, Tensor], scheme: Scheme) -> Columns:
        """The codes of one expert, from its blocks [N, G, 16] and scales [N, G]."""
        return Columns(codes_of_blocks(tensors["blocks"], tensors["scales"]))


def codes_of_blocks(blocks: Tensor, scales: Tensor) -> Codes:
    """The codes of one matrix: blocks uint8 [N, G, 16] and scales uint8 [N, G] -> codes [N, 32 * G].

    Raises:
        BadInput: other shapes or dtypes.
    """
    fits = blocks.dim() == 3 and blocks.shape[2] == GROUP // 2 and blocks.shape[:2] == scales.shape
    if not fits or blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise BadInput(
            f"MXFP4 blocks are uint8 [N, G, {GROUP // 2}] with scales uint8 [N, G], found {blocks.dtype} {list(blocks.shape)}"
            f" with {scales.dtype} {list(scales.shape)}; give one expert's matrix"
        )
    grid = Mx()
    return Codes(
        values_NK=unpack_pairs(blocks.flatten(1)),
        scale_NG=scales.contiguous().view(grid.scale_dtype),
        table_TE=grid.tables.to(blocks.device),
        grid=grid,
    )


def blocks_of_codes(codes: Codes) -> tuple[Tensor, Tensor]:
    """The inverse: (blocks uint8 [N, G, 16], scales uint8 [N, G]). Raises `BadInput` for codes on another grid."""
    N, K = codes.values_NK.shape
    if codes.grid != Mx() or K % GROUP:
        raise BadInput(f"MXFP4 blocks hold {Mx()} with K a multiple of {GROUP}, found {codes.grid} with K = {K}")
    packed = codes.values_NK[:, ::2] | codes.values_NK[:, 1::2] << 4
    return packed.reshape(N, K // GROUP, GROUP // 2), codes.scale_NG.contiguous().view(torch.uint8)
