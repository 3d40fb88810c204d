"""Scales of bytes: the rewriting is exact, and layouts of floats mean what their codes decode to."""

from __future__ import annotations

import pytest
import torch

from aerogel.errors import BadInput
from aerogel.kernels.gemm.block_scales import E5M3, E8M0, MOST_E8M0, UE5M3, stored_bytes, tile_bytes, tile_numbers
from aerogel.kernels.gemm.cuda_weight import codes_of, order_of, tensors_of
from aerogel.kernels.gemm.small_floats import INSIDE, KINDS, float_kind, mantissa_bits, names, pack_floats
from aerogel.pack.tile_orders import BYTES, E2M1, PAIRS, ROWS, pack_in_order, unpack_in_order
from aerogel.pack.tiles import unpack_tiles
from aerogel.quantize.codes import Codes, quantized
from aerogel.quantize.formats.bitmod import Bitmod
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


@pytest.mark.parametrize("kind", [*KINDS, *INSIDE])
def test_floats_are_held_as_they_are_or_as_the_same_number_in_a_wider_one(kind: Kind) -> None:
    grid = Float(kind=kind, group_size=16)
    held, codes = float_kind(grid), names(grid)
    assert held == INSIDE.get(kind, kind) and (codes is None) is (held == kind)
    if codes is not None and held is not None:
        wider = torch.tensor(float_numbers(held))[codes.long()]
        assert torch.equal(wider.view(torch.int32), grid.tables[0].view(torch.int32))
    for other in (Float(kind="e3m0"), Nf4(), Rf8(), Bitmod()):
        assert float_kind(other) is None and mantissa_bits(other) == 0


@pytest.mark.parametrize(("code", "mantissa"), [(0x7F, 3), (0xFF, 3), (0x7C, 2), (0xFE, 2)])
def test_what_is_no_number_is_refused(code: int, mantissa: int) -> None:
    with pytest.raises(BadInput, match="NaN or an infinity"):
        pack_floats(torch.full((16, 128), code, dtype=torch.uint8), 8, mantissa)


LINES = 0xFFFFFFFF


def placed(four: torch.Tensor, rest: torch.Tensor, bits: int, mantissa: int, step: torch.Tensor, i: int) -> torch.Tensor:
    """What floats.cuh makes of a step's words for register i, int64 of 32 bits."""
    low, top = 7 - mantissa, 11 - mantissa
    around = (four >> 4) | (four << 28) & LINES
    both = 0x80008000 | (((1 << (bits - 1)) - 1) << low) * 0x10001
    if bits == 4 and i == 3:
        return (four << 2) & 0x80C080C0 | (four >> 6) & 0x01000100
    if bits == 4:
        return (four, four << 6, around)[i] & both
    if bits == 8 and i % 2 == 0:
        return four & both
    if bits == 8 and mantissa == 3:
        return around & 0x87808780 | (four << 4) & 0x00700070
    if bits == 8:
        return (four << 11) & 0x80008000 | (four >> 3) & 0x0E000E00 | (four << 5) & 0x01E001E0
    right = 4 * i - low
    magnitude = (four >> right if right >= 0 else four << -right) & (0xF << low) * 0x10001
    if bits == 5:
        return (rest << (15 - 4 * (step % 4) - i)) & 0x80008000 | magnitude
    place = 4 * (step % 2) + i
    fifth = torch.where(place > top - 8, rest << place, rest << (8 + place)) & (1 << top) * 0x10001
    return (rest << place) & 0x80008000 | fifth | magnitude


@pytest.mark.parametrize("kind", KINDS)
def test_floats_come_into_place(kind: Kind) -> None:
    bits, mantissa = 1 + int(kind[1]) + int(kind[3]), int(kind[3])
    codes = torch.randint(0, 1 << bits, (16, 128), dtype=torch.uint8)
    if bits == 8:
        codes[(codes & 127) >= (127 if mantissa == 3 else 124)] = 0
    packed, order = pack_floats(codes, bits, mantissa), order_of(bits, mantissa, False)
    back = unpack_tiles(packed, bits, 16, 128) if order is None else unpack_in_order(packed, bits, order, 16, 128)
    assert torch.equal(back, codes)
    raw = packed.flatten().view(torch.int32).long() & LINES
    s, t, g = torch.meshgrid(torch.arange(8), torch.arange(4), torch.arange(8), indexing="ij")
    wide = raw[:256].reshape(2, 8, 4, 4)[s // 4, g, t, s % 4]  # piece, g, t, step % 4
    wide8 = raw[-256:].reshape(2, 8, 4, 4)[s // 4, g, t, s % 4]
    rest = torch.zeros_like(wide)
    if bits == 6:
        rest = raw[256:].reshape(8, 4, 4)[g, t, s // 2]
    if bits == 5:
        rest = raw[256:].reshape(8, 4, 2)[g, t, s // 4]
    numbers = torch.tensor(float_numbers(kind))[codes.long()]
    for register in range(4):
        both = placed(wide8 if bits == 8 and register > 1 else wide, rest, bits, mantissa, s, register) & LINES
        for half in range(2):
            bits16 = (both >> 16 * half) & 0xFFFF
            found = torch.where(bits16 >= 1 << 15, bits16 - (1 << 16), bits16).short().view(torch.bfloat16).float()
            row, column = g + 8 * (register % 2), 16 * s + 8 * (register // 2) + 2 * t + half
            assert torch.equal(found * 2.0 ** (128 - (1 << (bits - 2 - mantissa))), numbers[row, column])


def test_a_byte_holds_a_pair() -> None:
    codes = torch.randint(0, 16, (16, 128), dtype=torch.uint8)
    packed = pack_in_order(codes, 4, PAIRS)
    assert torch.equal(unpack_in_order(packed, 4, PAIRS, 16, 128), codes)
    pairs = packed.reshape(2, 8, 4, 4, 4)  # piece, g, t, step % 4, register
    s, g, t, i = torch.meshgrid(torch.arange(8), torch.arange(8), torch.arange(4), torch.arange(4), indexing="ij")
    row, column = g + 8 * (i % 2), 16 * s + 8 * (i // 2) + 2 * t
    assert torch.equal(pairs[s // 4, g, t, s % 4, i], codes[row, column] | codes[row, column + 1] << 4)


def test_two_steps_share_a_word_of_each_row() -> None:
    codes = torch.randint(0, 16, (48, 256), dtype=torch.uint8)
    packed = pack_in_order(codes, 4, ROWS)
    assert torch.equal(unpack_in_order(packed, 4, ROWS, 48, 256), codes)
    words = packed[1, 1].reshape(2, 8, 4, 2, 2, 2, 2)  # piece, g, t, pair of steps, row half, step of the pair, register
    s, g, t, h, j = torch.meshgrid(*(torch.arange(n) for n in (8, 8, 4, 2, 2)), indexing="ij")
    row, column = 16 + g + 8 * h, 128 + 16 * s + 8 * j + 2 * t
    assert torch.equal(words[s // 4, g, t, s // 2 % 2, h, s % 2, j], codes[row, column] | codes[row, column + 1] << 4)


def test_a_byte_is_a_code() -> None:
    codes = torch.randint(0, 256, (16, 128), dtype=torch.uint8)
    packed = pack_in_order(codes, 8, BYTES)
    assert torch.equal(unpack_in_order(packed, 8, BYTES, 16, 128), codes)
    held = packed.reshape(2, 2, 8, 4, 4, 4)  # word of a step, piece, g, t, step % 4, byte
    axes = [torch.arange(size) for size in (8, 8, 4, 4, 2)]
    s, g, t, i, e = torch.meshgrid(*axes, indexing="ij")
    row, column = g + 8 * (i % 2), 16 * s + 8 * (i // 2) + 2 * t + e
    assert torch.equal(held[i // 2, s // 4, g, t, s % 4, i % 2 * 2 + e], codes[row, column])


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
