"""Words of eight codes: they invert at every width and ragged shape, and every bit lies where the contract says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aerogel.errors import BadInput
from aerogel.pack import tiles, words


def random_codes(N: int, K: int, bits: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(N * 1000 + K + bits)
    return torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8, generator=generator)


def by_the_contract(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Bit by bit, from the sentences of the contract and nothing shared with the fast version."""
    N, K = codes.shape
    packed = torch.zeros(-(-N // 16), -(-K // 128), 256 * bits, dtype=torch.uint8)
    widths = {1: [1], 2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [4, 4]}[bits]
    for n in range(N):
        for k in range(K):
            i, lane = divmod(k % 128, 16)
            offset, low = 0, 0
            for width in widths:
                field = (int(codes[n, k]) >> low) & ((1 << width) - 1)
                start, bit = (16 * (n % 16) + lane) * width, width * i
                packed[n // 16, k // 128, offset + start + bit // 8] |= field << bit % 8
                offset, low = offset + 256 * width, low + width
    return packed


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("N", "K"), [(1, 1), (16, 128), (19, 150)])
def test_every_bit_is_where_the_contract_says(N: int, K: int, bits: int) -> None:
    codes = random_codes(N, K, bits)
    assert torch.equal(words.pack_words(codes, bits), by_the_contract(codes, bits))


@settings(max_examples=60, deadline=None)
@given(N=st.integers(1, 70), K=st.integers(1, 400), bits=st.integers(1, 8), chunk=st.sampled_from([1, 5000, 1 << 20]))
def test_unpack_inverts_pack(N: int, K: int, bits: int, chunk: int) -> None:
    codes = random_codes(N, K, bits)
    whole = dict(tiles.CHUNK)
    try:
        tiles.CHUNK["cpu"] = chunk
        packed = words.pack_words(codes, bits)
        assert packed.shape == (-(-N // 16), -(-K // 128), 256 * bits)
        assert torch.equal(words.unpack_words(packed, bits, N, K), codes)
    finally:
        tiles.CHUNK.update(whole)


def test_other_strides_and_the_meta_device() -> None:
    codes = random_codes(96, 40, 3)
    assert torch.equal(words.pack_words(codes.T, 3), words.pack_words(codes.T.contiguous(), 3))
    packed = words.pack_words(torch.empty(40, 200, dtype=torch.uint8, device="meta"), 5)
    assert packed.is_meta and packed.shape == (3, 2, 1280)
    assert words.unpack_words(packed, 5, 40, 200).shape == (40, 200)


def test_what_cannot_be_packed_says_so() -> None:
    with pytest.raises(BadInput, match="9 bits"):
        words.pack_words(torch.zeros(1, 1, dtype=torch.uint8), 9)
    with pytest.raises(BadInput, match="uint8 matrix"):
        words.pack_words(torch.zeros(1, 1), 4)
    with pytest.raises(BadInput, match=r"\[1, 2, 1024\]"):
        words.unpack_words(torch.zeros(1, 1, 1024, dtype=torch.uint8), 4, 16, 129)
