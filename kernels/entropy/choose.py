"""Which coder runs: the compiled one on a CPU where there is one, CUDA for tensors on a GPU, else the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.kernels.entropy import ref
from aerogel.kernels.entropy.ref import Coded
from aerogel.kernels.native.library import missing, say_missing


def _compiled(tensor: Tensor) -> bool:
    """Whether the compiled coder takes a tensor; a warning where it would and was not compiled."""
    if tensor.device.type != "cpu":
        return False
    say_missing()
    return missing() is None


def encode(symbols: Tensor) -> Coded:
    """Codes contiguous bytes uint8 on the CPU; every coder writes the same bytes."""
    if not _compiled(symbols):
        return ref.encode(symbols)
    from aerogel.kernels.entropy import cpu

    return cpu.encode(symbols)


def counts(symbols: Tensor) -> Tensor:
    """How often each byte occurs among contiguous uint8 on the CPU, int64 [256]."""
    if not _compiled(symbols):
        return torch.bincount(symbols.int(), minlength=256)
    from aerogel.kernels.entropy import cpu

    return cpu.counts(symbols)


def decode(coded: Coded) -> Tensor:
    """The bytes back, on the device of the stream."""
    if coded.stream.device.type == "cuda":
        from aerogel.kernels.entropy import cuda

        return cuda.decode(coded)
    if not _compiled(coded.stream):
        return ref.decode(coded)
    from aerogel.kernels.entropy import cpu

    return cpu.decode(coded)


def decode_bfloat16(coded: Coded, rest: Tensor) -> Tensor:
    """bfloat16 numbers from coded exponents and the byte with sign and mantissa of each, on the device of the stream."""
    if coded.stream.device.type == "cuda":
        from aerogel.kernels.entropy import cuda

        return cuda.decode_bfloat16(coded, rest)
    if not _compiled(coded.stream):
        return ref.join_bfloat16(ref.decode(coded), rest)
    from aerogel.kernels.entropy import cpu

    return cpu.decode_bfloat16(coded, rest)


def split_bfloat16(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Exponents, and signs (top bit) with mantissas, uint8 [n] each, of contiguous bfloat16 numbers on the CPU."""
    if not _compiled(numbers):
        return ref.split_bfloat16(numbers)
    from aerogel.kernels.entropy import cpu

    return cpu.split_bfloat16(numbers)
