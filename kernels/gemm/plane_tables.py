"""What the CUDA kernels read beside the codes of bit planes, from which they make a table of sums for each group.

    rows      the numbers of every row and group: a_0 .. a_(q-1) and, of up to three planes, the offset as the fourth; four
              numbers of the activations' type are one int64 of the layout's scales. The offset of four planes lies where
              zero points do.
    blocks    ready tables of eight columns, one for all rows of a row tile: the eight sums' low bytes, then their high
              bytes; 32 bytes for the 16 columns of a step, which lie in the layout's scales as 16 times an int16

The sums of four planes are eight numbers and the same with the other sign, so their codes are renamed: u < 8 is the number u
with the first sign +, u >= 8 is minus the number u - 8.

Shape legend: N out features, B blocks of outputs, G groups along K, q planes, R row tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.pack.tiles import ROWS, pack_rows_of_tiles, unpack_rows_of_tiles
from aerogel.quantize.planes import sums_of

OF_ROWS, OF_BLOCKS = torch.int64, torch.int16
"""Types of a tile layout's scales that say which of the two they are."""
MOST_PLANES = 4
COLUMNS = 8
"""Columns of a block."""


def renamed(codes: Tensor) -> Tensor:
    """Codes of four planes, uint8, as the kernels have them."""
    return torch.where(codes < 8, 15 - codes, codes - 8)


def own_names(codes: Tensor) -> Tensor:
    """The inverse of `renamed`."""
    return torch.where(codes < 8, codes + 8, 15 - codes)


def numbers_of_rows(alpha_NGq: Tensor, offset_NG: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """tile_scale int64 [R, G, 16] of alphas and offsets in `dtype`, 16 bits; of four planes and offsets tile_zero too."""
    planes = alpha_NGq.shape[-1]
    four = torch.nn.functional.pad(alpha_NGq, (0, MOST_PLANES - planes))
    if planes < MOST_PLANES and offset_NG is not None:
        four[..., -1] = offset_NG
    layout = {"tile_scale": pack_rows_of_tiles(four.to(dtype).contiguous().view(OF_ROWS)[..., 0])}
    if planes == MOST_PLANES and offset_NG is not None:
        layout["tile_zero"] = pack_rows_of_tiles(offset_NG.to(dtype))
    return layout


def rows_of_numbers(
    tile_scale: Tensor, tile_zero: Tensor | None, N: int, planes: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The inverse of `numbers_of_rows`: alphas [N, G, q] and offsets [N, G], which mean nothing where there are none."""
    four = unpack_rows_of_tiles(tile_scale, N)[..., None].view(dtype)
    return four[..., :planes], four[..., -1] if tile_zero is None else unpack_rows_of_tiles(tile_zero, N)


def tables_of_blocks(alpha_BGq: Tensor, offset_BG: Tensor, block_rows: int, N: int, dtype: torch.dtype) -> Tensor:
    """tile_scale int16 [R, ceil(G / 2), 16] of blocks of `block_rows` rows, a multiple of 16."""
    planes, G = alpha_BGq.shape[-1], alpha_BGq.shape[1]
    sums = sums_of(alpha_BGq, offset_BG)[..., -8:].to(dtype)  # of four planes those whose first sign is +
    sums = torch.nn.functional.pad(sums, (0, 8 - sums.shape[-1], 0, G % 2)).contiguous()
    raw = sums.view(torch.uint8).reshape(len(sums), -1, 8, 2).transpose(2, 3).contiguous()
    steps = raw.flatten(2).view(OF_BLOCKS).reshape(len(sums), -1, 16)
    if planes == MOST_PLANES and bool(offset_BG.any()):
        raise BadInput("tables of blocks have eight numbers, which hold no offset of four planes")
    first_row = torch.arange(-(-N // ROWS), device=steps.device) * ROWS
    return steps.index_select(0, first_row // block_rows)
