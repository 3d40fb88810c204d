"""Entropy coding of bytes, said plainly: Huffman codes of bounded length over runs that decode side by side.

Numbers that a model stores are not uniform: the exponents of trained bfloat16 weights carry about 2.6 of their 8 bits
(Zhang et al., "70% Size, 100% Accuracy", 2025, section 2.1). A prefix code stores a symbol of probability p in about
-log2 p bits, here with whole bits, as Huffman's: on exponents within 2 % of the entropy. Decoding gives back every byte.

    code        a canonical prefix code: only its lengths are stored, 0 .. 12 bits for each of the 256 bytes
    run         256 symbols, whose bits begin at a byte; the lowest bit of a byte comes first
    bytes       uint8  [sum of lengths]     the runs, one after the other
    lengths     int16  [runs]               bytes of each run
    code        uint8  [256]                bits of each symbol, 0 for one that never occurs

Twelve bits make the whole decoder one table of 4096 entries: look up the next 12 bits, take the symbol, skip its length.
Runs do not depend on one another, so a GPU gives each to a thread; the price is 16 bits of length and at most 7 of padding
for 256 symbols, 0.08 bits per symbol.

Shape legend: n symbols, R runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from aerogel.errors import BadInput

RUN = 256
LONGEST = 12
"""Bits of the longest code; the decoder's table has 2^LONGEST entries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coded:
    """Coded bytes: `count` symbols in the tensors that the module's text describes, all on one device."""

    stream: Tensor
    lengths: Tensor
    code: Tensor
    count: int

    @property
    def nbytes(self) -> int:
        """What is stored."""
        return self.stream.nbytes + self.lengths.nbytes + self.code.nbytes

    def check(self) -> None:
        """Raises `BadInput` where the tensors do not belong together; afterwards no decoder reads beyond them."""
        runs = -(-self.count // RUN)
        if self.lengths.dtype != torch.int16 or tuple(self.lengths.shape) != (runs,):
            raise BadInput(f"{self.count} coded symbols have {runs} run lengths in int16, found {_found(self.lengths)}")
        if self.stream.dtype != torch.uint8 or self.stream.dim() != 1:
            raise BadInput(f"a coded stream is a row of uint8, found {_found(self.stream)}")
        if self.code.dtype != torch.uint8 or tuple(self.code.shape) != (256,):
            raise BadInput(f"a code has 256 lengths in uint8, found {_found(self.code)}")
        total = int(self.lengths.long().sum())
        if total != self.stream.numel():
            raise BadInput(f"the run lengths add up to {total} bytes, the stream has {self.stream.numel()}; it is not whole")
        bits = self.code.long()
        used = bits[bits > 0]
        if self.count and (int(bits.max()) > LONGEST or float((2.0**-used).sum()) > 1.0 or not len(used)):
            raise BadInput(f"the lengths of a code must lie within {LONGEST} bits and leave it decodable; the file is damaged")


def _found(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def entropy(counts: Tensor) -> float:
    """Shannon's bound in bits per symbol for a histogram: -sum p log2 p."""
    share = counts[counts > 0].double() / counts.sum()
    return float(-(share * share.log2()).sum()) + 0.0


def code_lengths(counts: Tensor, longest: int = LONGEST) -> Tensor:
    """The best prefix code with no code longer than `longest`: bits of each symbol, uint8, 0 where a symbol never occurs.

    Package-merge (Larmore and Hirschberg, 1990): a list of coins of value 2^-longest, one for each symbol with its count as
    price, is paired up, merged with fresh coins of twice the value, and so on; the cheapest 2 (symbols - 1) entries of the
    last list name each symbol as often as its code has bits.

    Args:
        counts: integers [S], S <= 2^longest, how often each symbol occurs.
    """
    present = [(int(count), [symbol]) for symbol, count in enumerate(counts.tolist()) if count]
    lengths = torch.zeros(len(counts), dtype=torch.uint8)
    if len(present) == 1:
        lengths[present[0][1][0]] = 1
        return lengths
    coins = sorted(present)
    packages = coins
    for _ in range(longest - 1):
        pairs = [(a[0] + b[0], a[1] + b[1]) for a, b in zip(packages[::2], packages[1::2], strict=False)]
        packages = sorted(coins + pairs)
    for _, symbols in packages[: 2 * (len(present) - 1)]:
        for symbol in symbols:
            lengths[symbol] += 1
    return lengths


def canonical(code: Tensor) -> Tensor:
    """The bits of each symbol, int32 [256], for lengths uint8 [256]: shorter first, then in order of symbols.

    Codes are written from their first bit into the lowest, so that a decoder reads them with a mask.
    """
    found = torch.zeros(256, dtype=torch.int32)
    value, before = 0, 0
    for bits, symbol in sorted((int(bits), symbol) for symbol, bits in enumerate(code.tolist()) if bits):
        value <<= bits - before
        found[symbol] = int(f"{value:0{bits}b}"[::-1], 2)
        value, before = value + 1, bits
    return found


def decoding_table(code: Tensor) -> Tensor:
    """int16 [2^LONGEST]: for each next 12 bits the symbol they begin with, plus 256 times its length."""
    table = torch.zeros(1 << LONGEST, dtype=torch.int16)
    words = canonical(code)
    for symbol, bits in enumerate(code.tolist()):
        if bits:
            table[int(words[symbol]) :: 1 << bits] = symbol + 256 * bits
    return table


def encode(symbols: Tensor) -> Coded:
    """Codes bytes uint8 [n] with the best code for them.

    Works on all runs at once, symbol by symbol, in torch: what faster encoders are tested against, byte for byte.
    """
    n = symbols.numel()
    code = code_lengths(torch.bincount(symbols.reshape(-1).long(), minlength=256))
    runs = -(-n // RUN)
    padded = torch.nn.functional.pad(symbols.reshape(-1).long(), (0, runs * RUN - n)).reshape(runs, RUN)
    bits = code.long()[padded]
    bits.reshape(-1)[n:] = 0
    begin = bits.cumsum(1) - bits
    lengths = (bits.sum(1) + 7) // 8
    # Each code is at most 12 bits and begins within a byte: it lies in three bytes.
    base = (lengths.cumsum(0) - lengths)[:, None]
    at = base + begin // 8
    word = torch.where(bits > 0, canonical(code).long()[padded], 0) << (begin % 8)
    stream = torch.zeros(int(lengths.sum()) + 3, dtype=torch.int64)
    for byte in range(3):
        stream.index_add_(0, (at + byte).reshape(-1), ((word >> 8 * byte) & 255).reshape(-1))
    whole = stream[: int(lengths.sum())].to(torch.uint8)
    return Coded(stream=whole, lengths=lengths.to(torch.int16), code=code, count=n)


def decode(coded: Coded) -> Tensor:
    """The bytes back, uint8 [n], on the device of the stream. All runs at once, one symbol of each at a time."""
    coded.check()
    device = coded.stream.device
    lengths = coded.lengths.long()
    runs = len(lengths)
    table = decoding_table(coded.code.cpu()).to(device).long()
    stream = torch.nn.functional.pad(coded.stream.long(), (0, 4))
    at = 8 * (lengths.cumsum(0) - lengths)
    last = 8 * coded.stream.numel()
    symbols = torch.empty(runs, RUN, dtype=torch.uint8, device=device)
    for step in range(min(RUN, coded.count)):
        byte = at.clamp_max(last) // 8
        window = stream[byte] | stream[byte + 1] << 8 | stream[byte + 2] << 16
        entry = table[(window >> at % 8) & ((1 << LONGEST) - 1)]
        symbols[:, step] = (entry & 255).to(torch.uint8)
        at = at + (entry >> 8)
    return symbols.reshape(-1)[: coded.count]


def split_bfloat16(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Exponents, and signs (top bit) with mantissas, uint8 [n] each: bfloat16 is sign 1, exponent 8, mantissa 7 bits."""
    words = numbers.reshape(-1).view(torch.int16).to(torch.int32)
    return (words >> 7 & 255).to(torch.uint8), ((words >> 8 & 0x80) | (words & 0x7F)).to(torch.uint8)


def join_bfloat16(exponents: Tensor, rest: Tensor) -> Tensor:
    """The inverse of `split_bfloat16`: bfloat16 [n]."""
    beside = rest.to(torch.int32)
    words = (beside & 0x80) << 8 | exponents.to(torch.int32) << 7 | (beside & 0x7F)
    return words.to(torch.int16).view(torch.bfloat16)


def bits_per_symbol(coded: Coded) -> float:
    """Everything stored, in bits per symbol."""
    return 8 * coded.nbytes / coded.count if coded.count else math.nan
