"""The MXFP4 tensors of gpt-oss checkpoints, `quant_method: mxfp4`: expert weights in blocks of 32.

    NAME_blocks  uint8 [..., N, G, 16]      32 e2m1 codes of a group, two a byte, the even one low
    NAME_scales  uint8 [..., N, G]          scale = 2^(u - 127)

These are the numbers of `mxfp4-pack-quantized` with the groups as an axis of their own; leading axes are experts.

Shape legend: N out features, K in features, G = K / 32 groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.pack.microscaling import unpack_pairs
from aerogel.quantize.codes import Codes
from aerogel.quantize.formats.mx import GROUP, Mx


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
