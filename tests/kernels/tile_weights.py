"""What a weight in the tile layout means, for every test that compares a kernel with it."""

from __future__ import annotations

import torch

from aerogel.kernels.gemm.block_scales import BYTES, tile_numbers
from aerogel.kernels.gemm.cuda_weight import TileWeight
from aerogel.kernels.gemm.small_floats import kind_of
from aerogel.pack import tiles
from aerogel.pack.mirrored_tables import SIGN
from aerogel.pack.tile_orders import unpack_in_order
from aerogel.quantize.formats.floats import float_numbers


def dense64(weight: TileWeight) -> torch.Tensor:
    """The weight in float64, from the definition."""
    N, K, size = weight.N, weight.K, weight.group_size or weight.K
    if weight.order is None:
        codes = tiles.unpack_tiles(weight.codes, weight.bits, N, K)
    else:
        codes = unpack_in_order(weight.codes, weight.bits, weight.order, N, K)

    def spread(values: torch.Tensor) -> torch.Tensor:
        return tiles.unpack_rows_of_tiles(values, N).repeat_interleave(size, 1)[:, :K]

    scale = spread(tile_numbers(weight.scale)).double()
    if weight.scale.dtype in BYTES and weight.factor is not None:
        scale = scale * weight.factor.double()
    if weight.floats and weight.bits == 1:
        return (2 * codes.double() - 1) * scale
    if weight.floats:
        numbers = torch.tensor(float_numbers(kind_of(weight.bits, weight.floats)), dtype=torch.float64, device=codes.device)
        return numbers[codes.long()] * scale
    if weight.table is not None:
        table = weight.table.double()
        rows = torch.arange(N, device=table.device)[:, None]
        row = rows if table.shape[0] > 1 else torch.zeros_like(rows)
        which = row if weight.pick is None else spread(weight.pick & (SIGN - 1)).long()
        if weight.pick is not None:
            scale = torch.where(spread(weight.pick) < SIGN, scale, -scale)
        return table[which, codes.long()] * scale
    zero = spread(weight.zero).double() if weight.zero is not None else float(1 << (weight.bits - 1))
    return (codes.double() - zero) * scale
