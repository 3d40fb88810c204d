"""Entropy coding: every byte comes back, the code is the best one, damaged streams are refused, and all coders agree."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.kernels.entropy import choose, ref
from aerogel.kernels.native.library import missing

needs_native = pytest.mark.skipif(missing() is not None, reason="the compiled CPU kernels are missing")

CODERS = ["ref", pytest.param("cpu", marks=needs_native)]


def coder(name: str) -> tuple[Callable[[Tensor], ref.Coded], Callable[[ref.Coded], Tensor]]:
    if name == "cpu":
        from aerogel.kernels.entropy import cpu

        return cpu.encode, cpu.decode
    return ref.encode, ref.decode


def bytes_like(kind: str, count: int) -> Tensor:
    """Bytes whose histograms are hard in different ways."""
    generator = torch.Generator().manual_seed(count)
    if kind == "uniform":
        return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    if kind == "constant":
        return torch.full((count,), 77, dtype=torch.uint8)
    if kind == "steep":  # powers of two: Huffman's own code would have 255 bits for the rarest
        return torch.empty(count).geometric_(0.5, generator=generator).clamp(max=255).to(torch.uint8)
    return (torch.randn(count, generator=generator) * 0.02).bfloat16().view(torch.int16).bitwise_right_shift(7).to(torch.uint8)


@pytest.mark.parametrize("name", CODERS)
@pytest.mark.parametrize("kind", ["uniform", "constant", "steep", "exponents"])
@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 20_000])
def test_every_byte_comes_back(name: str, kind: str, count: int) -> None:
    symbols = bytes_like(kind, count)
    encode, decode = coder(name)
    coded = encode(symbols)
    assert torch.equal(decode(coded), symbols)
    assert coded.stream.numel() == int(coded.lengths.long().sum())


@needs_native
@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=3000))
def test_compiled_coder_writes_the_bytes_of_the_reference(data: bytes) -> None:
    from aerogel.kernels.entropy import cpu

    symbols = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    plain, fast = ref.encode(symbols), cpu.encode(symbols)
    assert torch.equal(plain.stream, fast.stream)
    assert plain.lengths.tolist() == fast.lengths.tolist()
    assert torch.equal(ref.decode(fast), symbols)
    assert torch.equal(cpu.decode(plain), symbols)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 100_000), min_size=2, max_size=256).filter(lambda counts: sum(map(bool, counts)) > 1))
def test_code_is_the_best_there_is(counts: list[int]) -> None:
    """Against Huffman's construction where that stays within the bound; never less than the entropy; always decodable."""
    held = torch.tensor(counts)
    lengths = ref.code_lengths(held).long()
    cost = int((held * lengths).sum())
    assert float((2.0 ** -lengths[held > 0]).sum()) <= 1.0
    assert int(lengths.max()) <= ref.LONGEST
    assert cost >= ref.entropy(held) * sum(counts) * (1 - 1e-9)
    best, deepest = huffman(counts)
    assert cost >= best
    if deepest <= ref.LONGEST:
        assert cost == best


def huffman(counts: list[int]) -> tuple[int, int]:
    """Bits of the unbounded best code in all, and the length of its longest word."""
    heap = [(count, 0) for count in counts if count]
    heapq.heapify(heap)
    cost = 0
    while len(heap) > 1:
        (a, deep_a), (b, deep_b) = heapq.heappop(heap), heapq.heappop(heap)
        cost += a + b
        heapq.heappush(heap, (a + b, max(deep_a, deep_b) + 1))
    return cost, heap[0][1]


def test_exponents_of_gaussian_weights_cost_what_the_paper_says() -> None:
    coded = ref.encode(bytes_like("exponents", 1 << 18))
    bound = ref.entropy(torch.bincount(ref.decode(coded).long(), minlength=256))
    assert 2.4 < bound < 2.7
    assert ref.bits_per_symbol(coded) < bound + 0.2  # whole bits, run lengths and padding
    assert (8 + ref.bits_per_symbol(coded)) / 16 < 0.69


def test_counts_are_the_histogram() -> None:
    symbols = bytes_like("exponents", 5000)
    assert torch.equal(choose.counts(symbols), torch.bincount(symbols.int(), minlength=256))


@pytest.mark.parametrize("name", CODERS)
def test_damaged_streams_are_refused(name: str) -> None:
    encode, decode = coder(name)
    coded = encode(bytes_like("exponents", 1000))
    for broken, word in (
        (replace(coded, stream=coded.stream[:-1]), "not whole"),
        (replace(coded, count=1025), "run lengths"),
        (replace(coded, lengths=coded.lengths.int()), "int16"),
        (replace(coded, code=torch.full((256,), 3, dtype=torch.uint8)), "damaged"),
        (replace(coded, code=coded.code[:255]), "256 lengths"),
    ):
        with pytest.raises(BadInput, match=word):
            decode(broken)


@needs_native
def test_flipped_bits_stay_within_the_stream() -> None:
    """A stream of the right size with wrong bits gives wrong symbols, not a crash, and the number that was promised."""
    from aerogel.kernels.entropy import cpu

    coded = cpu.encode(bytes_like("exponents", 5000))
    noise = torch.randint(0, 256, coded.stream.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert cpu.decode(replace(coded, stream=noise)).numel() == 5000


@needs_native
def test_all_bfloat16_numbers() -> None:
    """NaNs with any payload, infinities, both zeros and subnormals come back bit for bit, whatever the threads."""
    from aerogel.kernels.entropy import cpu

    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.bfloat16)
    exponents, rest = cpu.split_bfloat16(numbers)
    coded = cpu.encode(exponents)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(cpu.decode_bfloat16(coded, rest).view(torch.int16), numbers.view(torch.int16))
            assert torch.equal(cpu.encode(exponents).stream, coded.stream)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 7, 255, 256, 257, 32_768, 1_000_003])
def test_gpu_gives_the_same_bytes(count: int) -> None:
    from aerogel.kernels.entropy import cuda

    coded = ref.encode(bytes_like("exponents", count))
    there = replace(coded, stream=coded.stream.cuda(), lengths=coded.lengths.cuda(), code=coded.code.cuda())
    wanted = ref.decode(coded)
    assert torch.equal(cuda.decode(there).cpu(), wanted)
    rest = torch.randint(0, 256, (count,), dtype=torch.uint8)
    numbers = torch.full((count,), float("nan"), dtype=torch.bfloat16, device="cuda")
    found = cuda.decode_bfloat16(there, rest.cuda(), numbers).cpu().view(torch.int16).long() & 0xFFFF
    joined = (rest.long() & 0x80) << 8 | wanted.long() << 7 | (rest.long() & 0x7F)
    assert torch.equal(found, joined)
