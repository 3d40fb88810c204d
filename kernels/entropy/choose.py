"""Which coder runs: the compiled one on a CPU where there is one, CUDA for tensors on a GPU, else the reference."""

from __future__ import annotations

from torch import Tensor

from aerogel.kernels.entropy import ref
from aerogel.kernels.entropy.ref import Coded
from aerogel.kernels.native.library import missing


def encode(symbols: Tensor) -> Coded:
    """Codes contiguous bytes uint8 on the CPU; every coder writes the same bytes."""
    if missing() is not None:
        return ref.encode(symbols)
    from aerogel.kernels.entropy import cpu

    return cpu.encode(symbols)


def decode(coded: Coded) -> Tensor:
    """The bytes back, on the device of the stream."""
    if coded.stream.device.type == "cuda":
        from aerogel.kernels.entropy import cuda

        return cuda.decode(coded)
    if missing() is not None or coded.stream.device.type != "cpu":
        return ref.decode(coded)
    from aerogel.kernels.entropy import cpu

    return cpu.decode(coded)


def decode_bfloat16(coded: Coded, rest: Tensor) -> Tensor:
    """bfloat16 numbers from coded exponents and the byte with sign and mantissa of each, on the device of the stream."""
    if coded.stream.device.type == "cuda":
        from aerogel.kernels.entropy import cuda

        return cuda.decode_bfloat16(coded, rest)
    if missing() is not None or coded.stream.device.type != "cpu":
        return ref.join_bfloat16(ref.decode(coded), rest)
    from aerogel.kernels.entropy import cpu

    return cpu.decode_bfloat16(coded, rest)


def split_bfloat16(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Exponents, and signs (top bit) with mantissas, uint8 [n] each, of contiguous bfloat16 numbers on the CPU."""
    if missing() is not None:
        return ref.split_bfloat16(numbers)
    from aerogel.kernels.entropy import cpu

    return cpu.split_bfloat16(numbers)
