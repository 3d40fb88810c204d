"""The tile layout: it inverts at every width and ragged shape, and every bit lies where the contract says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aerogel.errors import BadInput
from aerogel.pack import tiles


def random_codes(N: int, K: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(N * 1000 + K + bits)
    return torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8, generator=generator)


def by_the_contract(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Bit by bit, from the sentences of the contract and nothing shared with the fast version."""
    N, K = codes.shape
    R, C = -(-N // 16), -(-K // 128)
    packed = torch.zeros(R, C, 256 * bits, dtype=torch.uint8)
    widths = {1: [1], 2: [2], 3: [3], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [4, 4]}[bits]
    for n in range(N):
        for k in range(K):
            row, column = n % 16, k % 128
            g, i0 = row % 8, row // 8
            s, rest = divmod(column, 16)
            i1, rest = divmod(rest, 8)
            t, e = divmod(rest, 2)
            i, lane = i0 + 2 * i1, 4 * g + t
            offset, low = 0, 0
            for width in widths:
                field = (int(codes[n, k]) >> low) & ((1 << width) - 1)
                if width == 4:
                    start, bit = 512 * (s // 4) + 16 * lane + 4 * (s % 4), 4 * i + 16 * e
                elif width == 3:
                    half, f = s // 4, 4 * (s % 4) + i
                    for b in range(3):
                        word, bit = (3 * half + f // 5, 3 * (f % 5) + b) if f < 15 else (3 * half + b, 15)
                        start = 16 * lane + 4 * word if word < 4 else 512 + 8 * lane + 4 * (word - 4)
                        at = start + (bit + 16 * e) // 8
                        packed[n // 16, k // 128, at] |= (field >> b & 1) << bit % 8
                    continue
                elif width == 2:
                    start, bit = 16 * lane + 4 * (s // 2), 2 * (4 * (s % 2) + i) + 16 * e
                else:
                    start, bit = 8 * lane + 4 * (s // 4), 4 * (s % 4) + i + 16 * e
                packed[n // 16, k // 128, offset + start + bit // 8] |= field << bit % 8
                offset, low = offset + 256 * width, low + width
    return packed


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("N", "K"), [(1, 1), (16, 128), (19, 150)])
def test_every_bit_is_where_the_contract_says(N: int, K: int, bits: int) -> None:
    codes = random_codes(N, K, bits)
    assert torch.equal(tiles.pack_tiles(codes, bits), by_the_contract(codes, bits))


@settings(max_examples=60, deadline=None)
@given(N=st.integers(1, 70), K=st.integers(1, 400), bits=st.integers(1, 8), chunk=st.sampled_from([1, 5000, 1 << 20]))
def test_unpack_inverts_pack(N: int, K: int, bits: int, chunk: int) -> None:
    codes = random_codes(N, K, bits)
    whole = dict(tiles.CHUNK)
    try:
        tiles.CHUNK["cpu"] = chunk
        packed = tiles.pack_tiles(codes, bits)
        assert packed.shape == (-(-N // 16), -(-K // 128), 256 * bits)
        assert torch.equal(tiles.unpack_tiles(packed, bits, N, K), codes)
    finally:
        tiles.CHUNK.update(whole)


def test_other_strides_and_the_meta_device() -> None:
    codes = random_codes(96, 40, 3)
    assert torch.equal(tiles.pack_tiles(codes.T, 3), tiles.pack_tiles(codes.T.contiguous(), 3))
    packed = tiles.pack_tiles(torch.empty(40, 200, dtype=torch.uint8, device="meta"), 5)
    assert packed.is_meta and packed.shape == (3, 2, 1280)
    assert tiles.unpack_tiles(packed, 5, 40, 200).shape == (40, 200)


def test_scales_by_row_tile() -> None:
    scale = torch.arange(37 * 5).view(37, 5).float()
    packed = tiles.pack_rows_of_tiles(scale)
    assert packed.shape == (3, 5, 16) and packed[1, 3, 2] == scale[18, 3] and not packed[2, :, 5:].any()
    assert torch.equal(tiles.unpack_rows_of_tiles(packed, 37), scale)


def test_what_cannot_be_tiled_says_so() -> None:
    with pytest.raises(BadInput, match="9 bits"):
        tiles.pack_tiles(torch.zeros(1, 1, dtype=torch.uint8), 9)
    with pytest.raises(BadInput, match="uint8 matrix"):
        tiles.pack_tiles(torch.zeros(1, 1), 4)
    with pytest.raises(BadInput, match=r"\[1, 2, 1024\]"):
        tiles.unpack_tiles(torch.zeros(1, 1, 1024, dtype=torch.uint8), 4, 16, 129)
