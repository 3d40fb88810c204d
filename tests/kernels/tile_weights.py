"""What a weight in the tile layout means, for every test that compares a kernel with it."""

from __future__ import annotations

import torch

from aerogel.kernels.gemm.cuda_weight import TileWeight
from aerogel.pack import tiles


def dense64(weight: TileWeight) -> torch.Tensor:
    """The weight in float64, from the definition."""
    N, K, size = weight.N, weight.K, weight.group_size or weight.K
    codes = tiles.unpack_tiles(weight.codes, weight.bits, N, K)

    def spread(values: torch.Tensor) -> torch.Tensor:
        return tiles.unpack_rows_of_tiles(values, N).repeat_interleave(size, 1)[:, :K]

    scale = spread(weight.scale).double()
    if weight.table is not None:
        table = weight.table.double()
        rows = torch.arange(N, device=table.device)[:, None]
        row = rows if table.shape[0] > 1 else torch.zeros_like(rows)
        which = spread(weight.pick).long() if weight.pick is not None else row
        return table[which, codes.long()] * scale
    zero = spread(weight.zero).double() if weight.zero is not None else float(1 << (weight.bits - 1))
    return (codes.double() - zero) * scale
