"""Codes into tables in the layout of the CUDA kernels: exactly invertible, and the layout's numbers are the weight's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.quantize.test_tables import GRIDS, weight

from aerogel.kernels.gemm.block_scales import tile_numbers
from aerogel.kernels.gemm.cuda_weight import codes_of, order_of, tensors_of
from aerogel.kernels.gemm.small_floats import float_kind, kind_of, mantissa_bits
from aerogel.pack import tiles, words
from aerogel.pack.mirrored_tables import SIGN
from aerogel.pack.tile_orders import unpack_in_order
from aerogel.quantize.codes import Codes, quantized
from aerogel.quantize.formats.bitmod import Bitmod
from aerogel.quantize.formats.floats import float_numbers
from aerogel.quantize.formats.kmeans import KMeans
from aerogel.quantize.formats.mx import Mx
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.formats.nvfp4 import Nvfp4
from aerogel.quantize.grids import Fp8Grid


def same(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def check(codes: Codes) -> None:
    N, K = codes.values_NK.shape
    layout = tensors_of(codes)
    back = codes_of(layout, codes.grid, N, K)
    for name in ("values_NK", "scale_NG", "table_TE", "pick_NG", "factor"):
        a, b = getattr(back, name), getattr(codes, name)
        assert same(a, b), name
    scale = tiles.unpack_rows_of_tiles(tile_numbers(layout["tile_scale"]), N) * layout.get("tile_factor", torch.ones(()))
    g = torch.arange(K) // (codes.grid.group_size or K)
    table, packed = "tile_table" in layout, layout["tile_codes"]
    bits = packed.shape[2] // 256
    order = order_of(bits, 0 if table else mantissa_bits(codes.grid), table, rows=codes.table_per_row)
    values = tiles.unpack_tiles(packed, bits, N, K) if order is None else unpack_in_order(packed, bits, order, N, K)
    values = values.long()
    kind = float_kind(codes.grid)
    numbers = torch.tensor([float_numbers(kind)]) if kind is not None and not table else layout["tile_table"]
    table_of = torch.zeros(N, K, dtype=torch.long)
    if codes.table_per_row:
        table_of = torch.arange(N)[:, None].expand(N, K)
    if "tile_pick" in layout:
        pick = tiles.unpack_rows_of_tiles(layout["tile_pick"], N).long()
        assert len(layout["tile_table"]) == 2  # BitMoD's other two are their mirrors
        table_of, scale = (pick & (SIGN - 1))[:, g], torch.where(pick < SIGN, scale, -scale)
    assert torch.equal(numbers[table_of, values] * scale[:, g], codes.decode())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (130, 200)])
def test_layout_is_invertible_and_means_the_weight(grid: Any, shape: tuple[int, int]) -> None:
    check(quantized(grid, weight(*shape), grid.fit(weight(*shape), search="mse")))


def test_a_table_per_row() -> None:
    values = torch.randint(0, 16, (21, 40), dtype=torch.uint8)
    check(Codes(values_NK=values, scale_NG=torch.ones(21, 1), table_TE=torch.randn(21, 16), grid=KMeans(bits=4)))


@pytest.mark.parametrize("grid", [Nvfp4(), Mx(), Nf4(), Bitmod(), Fp8Grid()], ids=str)
def test_portable_kernels_get_codes_in_no_order_tables_and_scales(grid: Any) -> None:
    """The words of the Triton kernels know no order of bits and no mirrored tables; floats and bytes are those of tiles."""
    w_NK = torch.randn(48, 256, generator=torch.Generator().manual_seed(0))
    codes = quantized(grid, w_NK, grid.fit(w_NK))
    layout = tensors_of(codes, words.pack_words)
    bits = layout["tile_codes"].shape[2] // 256
    u_NK = words.unpack_words(layout["tile_codes"], bits, 48, 256).long()

    def spread(values: torch.Tensor) -> torch.Tensor:
        found = tiles.unpack_rows_of_tiles(values, 48)
        return found.repeat_interleave(256 // found.shape[1], 1)

    mantissa = mantissa_bits(grid)
    table = torch.tensor([float_numbers(kind_of(bits, mantissa))]) if mantissa else layout["tile_table"].float()
    which = spread(layout["tile_pick"]).long() if "tile_pick" in layout else torch.zeros_like(u_NK)
    scale = spread(tile_numbers(layout["tile_scale"])) * layout.get("tile_factor", 1)
    torch.testing.assert_close(table[which, u_NK] * scale, codes.decode(), rtol=1e-6, atol=0)
    assert torch.equal(codes_of(layout, grid, 48, 256, words.unpack_words).decode(), codes.decode())
