"""Scales of bytes: the rewriting is exact, and layouts of floats mean what their codes decode to."""

from __future__ import annotations

import pytest
import torch

from aerogel.errors import BadInput
from aerogel.kernels.gemm.block_scales import E5M3, E8M0, MOST_E8M0, UE5M3, stored_bytes, tile_bytes, tile_numbers
from aerogel.kernels.gemm.cuda_weight import codes_of, float_codes, of_floats, tensors_of
from aerogel.pack.tile_orders import E2M1, E4M3, PAIRS, pack_in_order, unpack_in_order
from aerogel.quantize.codes import Codes, quantized
from aerogel.quantize.formats.floats import Float, Kind, float_numbers
from aerogel.quantize.formats.mx import Mx
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.formats.nvfp4 import Nvfp4
from aerogel.quantize.formats.rf8 import Rf8
from aerogel.quantize.scales import scale_values


def test_every_e4m3_number_has_its_byte() -> None:
    stored = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    found = tile_bytes(stored)
    assert found is not None
    made, power = found
    assert made.dtype == E5M3 and power == 0
    assert torch.equal(tile_numbers(made), stored.float())
    assert torch.equal(stored_bytes(made, stored.dtype, power).view(torch.uint8), stored.view(torch.uint8))
    # As the kernels make a bfloat16 and a float32 of a byte.
    bits = made[1:].int() * 16 + ((127 - 10) << 7)
    assert torch.equal(bits.short().view(torch.bfloat16).float(), stored[1:].float())
    assert torch.equal((made.int() << 20).view(torch.float32) * 2.0**117, stored.float())


def test_e8m0_stays_as_it_is_while_small() -> None:
    small = torch.arange(MOST_E8M0 + 1, dtype=torch.uint8).view(E8M0)
    made = tile_bytes(small)
    assert made is not None and made[0] is small and made[1] == 0
    assert torch.equal(stored_bytes(small, E8M0, 0).view(torch.uint8), small.view(torch.uint8))
    assert tile_bytes(torch.tensor([MOST_E8M0 + 1], dtype=torch.uint8).view(E8M0)) is None


@pytest.mark.parametrize("least", [8, 8 * 9 + 3, 8 * 14])
def test_ue5m3_moves_to_where_e4m3_is(least: int) -> None:
    stored = torch.arange(least, min((least // 8 + 18) * 8, 255), dtype=torch.uint8)
    found = tile_bytes(stored)
    assert found is not None
    made, power = found
    assert int(made.max()) >> 3 == 18 and int(made.min()) >= 8
    assert torch.equal(tile_numbers(made) * 2.0**power, scale_values(stored))
    assert torch.equal(stored_bytes(made, UE5M3, power), stored)
    apart = torch.tensor([least, least + 18 * 8 + 7 if least < 100 else 7], dtype=torch.uint8)
    assert tile_bytes(apart) is None


@pytest.mark.parametrize(
    ("byte", "dtype"), [(0x7F, torch.float8_e4m3fn), (0xB8, torch.float8_e4m3fn), (0xFF, E8M0), (0xFF, UE5M3)]
)
def test_what_is_no_scale_is_refused(byte: int, dtype: torch.dtype) -> None:
    with pytest.raises(BadInput, match="negative or no number"):
        tile_bytes(torch.tensor([8, byte], dtype=torch.uint8).view(dtype))


def placed(words: list[torch.Tensor], bits: int, register: int) -> torch.Tensor:
    """What the kernels make of a step's words, int64 of 32 bits."""
    word = words[0 if bits == 4 else register // 2]
    around = (word >> 4) | (word << 28) & 0xFFFFFFFF
    if bits == 8:
        return around & 0x87808780 | (word << 4) & 0x00700070 if register % 2 else word & 0x87F087F0
    split = (word << 2) & 0x80C080C0 | (word >> 6) & 0x01000100
    return split if register == 3 else (word, (word << 6) & 0xFFFFFFFF, around)[register] & 0x81C081C0


@pytest.mark.parametrize("kind", ["e1m1", "e2m0", "e2m1", "e2m2", "e3m1", "e2m3", "e3m2", "e4m3"])
def test_narrow_floats_are_held_as_the_same_number_in_a_wider_one(kind: Kind) -> None:
    grid = Float(kind=kind, group_size=16)
    codes = float_codes(grid)
    assert codes is not None and of_floats(grid)
    wider = torch.tensor(float_numbers("e2m1" if grid.bits <= 4 else "e4m3"))[codes.long()]
    assert torch.equal(wider.nan_to_num(9).view(torch.int32), grid.tables[0].nan_to_num(9).view(torch.int32))
    for other in (Float(kind="e3m0"), Float(kind="e5m2"), Nf4(), Rf8()):
        assert float_codes(other) is None and not of_floats(other)


@pytest.mark.parametrize(("bits", "kind"), [(4, "e2m1"), (8, "e4m3")])
def test_floats_come_into_place(bits: int, kind: str) -> None:
    codes = torch.randint(0, 1 << bits, (16, 128), dtype=torch.uint8)
    codes[(codes & 127) == 127] = 0
    order = E2M1 if bits == 4 else E4M3
    packed = pack_in_order(codes, bits, order)
    assert torch.equal(unpack_in_order(packed, bits, order, 16, 128), codes)
    words = packed.view(torch.int32).long().reshape(bits // 4, 2, 8, 4, 4) & 0xFFFFFFFF  # limb, piece, g, t, step % 4
    numbers = torch.tensor(float_numbers(kind))[codes.long()]
    for register in range(4):
        both = placed(list(words), bits, register)
        for half in range(2):
            raw = (both >> 16 * half) & 0xFFFF
            found = torch.where(raw >= 1 << 15, raw - (1 << 16), raw).short().view(torch.bfloat16).float()
            s, t, g = torch.meshgrid(torch.arange(8), torch.arange(4), torch.arange(8), indexing="ij")
            row, column = g + 8 * (register % 2), 16 * s + 8 * (register // 2) + 2 * t + half
            assert torch.equal(found[s // 4, g, t, s % 4] * 2.0 ** (126 if bits == 4 else 120), numbers[row, column])


def test_a_byte_holds_a_pair() -> None:
    codes = torch.randint(0, 16, (16, 128), dtype=torch.uint8)
    packed = pack_in_order(codes, 4, PAIRS)
    assert torch.equal(unpack_in_order(packed, 4, PAIRS, 16, 128), codes)
    pairs = packed.reshape(2, 8, 4, 4, 4)  # piece, g, t, step % 4, register
    s, g, t, i = torch.meshgrid(torch.arange(8), torch.arange(8), torch.arange(4), torch.arange(4), indexing="ij")
    row, column = g + 8 * (i % 2), 16 * s + 8 * (i // 2) + 2 * t
    assert torch.equal(pairs[s // 4, g, t, s % 4, i], codes[row, column] | codes[row, column + 1] << 4)


@pytest.mark.parametrize("grid", [Nvfp4(), Nvfp4(scale_dtype=UE5M3), Mx()], ids=str)
def test_groups_of_nothing_and_large_scales(grid: Nvfp4 | Mx) -> None:
    w = torch.randn(32, 128)
    w[:, 16:48] = 0
    for scaled in (w, w * 1e30):
        codes = quantized(grid, scaled, grid.fit(scaled))
        layout = tensors_of(codes)
        back: Codes = codes_of(layout, grid, 32, 128)
        assert torch.equal(back.decode(), codes.decode())
        narrow = isinstance(grid, Nvfp4) or scaled is w
        assert (layout["tile_scale"].dtype in (E5M3, E8M0)) is narrow and ("stored_scale" in layout) is not narrow


def test_a_scale_of_nothing_takes_its_codes_along() -> None:
    grid = Nvfp4()
    codes = quantized(grid, torch.randn(16, 64), grid.fit(torch.randn(16, 64)))
    scale = codes.scale_NG.view(torch.uint8).clone()
    scale[3, 1] = 0
    spoiled = Codes(
        values_NK=codes.values_NK,
        scale_NG=scale.view(torch.float8_e4m3fn),
        table_TE=codes.table_TE,
        factor=codes.factor,
        grid=grid,
    )
    layout = tensors_of(spoiled)
    assert not unpack_in_order(layout["tile_codes"], 4, E2M1, 16, 64)[3, 16:32].any()
    assert torch.equal(codes_of(layout, grid, 16, 64).decode(), spoiled.decode())
