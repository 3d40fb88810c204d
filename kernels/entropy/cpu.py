"""Entropy coding on the CPU's compiled kernels (kernels/native/entropy.cpp): the same bytes as ref.py, at hundreds of MB/s.

Shape legend: n symbols, R runs.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from aerogel.kernels.entropy.ref import LONGEST, RUN, Coded, canonical, code_lengths, decoding_table
from aerogel.kernels.native.library import check, library


class Code(ctypes.Structure):
    """`EntropyCode` of entropy.h."""

    _fields_ = [("bits", ctypes.c_uint8 * 256), ("words", ctypes.c_uint16 * 256)]


def counts(symbols: Tensor) -> Tensor:
    """How often each byte occurs, int64 [256]."""
    found = torch.zeros(256, dtype=torch.int64)
    library().aerogel_native_count_bytes(_at(symbols), _long(symbols.numel()), _at(found), torch.get_num_threads())
    return found


def encode(symbols: Tensor) -> Coded:
    """Codes contiguous bytes uint8 [n] with the best code for them. Byte for byte what `ref.encode` gives."""
    symbols = symbols.reshape(-1)
    count, threads = symbols.numel(), torch.get_num_threads()
    code = code_lengths(counts(symbols))
    words = Code((ctypes.c_uint8 * 256)(*code.tolist()), (ctypes.c_uint16 * 256)(*canonical(code).tolist()))
    lengths = torch.empty(-(-count // RUN), dtype=torch.int16)
    call = library()
    status = call.aerogel_native_entropy_lengths(_at(symbols), _long(count), ctypes.byref(words), _at(lengths), threads)
    check(status, "entropy coding")
    stream = torch.empty(int(lengths.long().sum()), dtype=torch.uint8)
    status = call.aerogel_native_entropy_encode(
        _at(symbols), _long(count), ctypes.byref(words), _at(lengths), _at(stream), _long(stream.numel()), threads
    )
    check(status, "entropy coding")
    return Coded(stream=stream, lengths=lengths, code=code, count=count)


def decode(coded: Coded) -> Tensor:
    """The bytes back, uint8 [n]. Raises `BadInput` for tensors that do not belong together."""
    coded.check()
    symbols = torch.empty(coded.count, dtype=torch.uint8)
    _run("aerogel_native_entropy_decode", coded, _at(symbols))
    return symbols


def decode_bfloat16(coded: Coded, rest: Tensor, out: Tensor | None = None) -> Tensor:
    """Numbers from coded exponents and signs and mantissas, bfloat16 [n], decoded into `out` where it is given."""
    coded.check()
    numbers = torch.empty(coded.count, dtype=torch.bfloat16) if out is None else out
    _run("aerogel_native_entropy_decode_bfloat16", coded, _at(rest), _at(numbers))
    return numbers


def split_bfloat16(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Exponents, and signs (top bit) with mantissas, uint8 [n] each, of contiguous bfloat16 numbers."""
    exponents, rest = (torch.empty(numbers.numel(), dtype=torch.uint8) for _ in range(2))
    library().aerogel_native_split_bfloat16(
        _at(numbers), _long(numbers.numel()), _at(exponents), _at(rest), torch.get_num_threads()
    )
    return exponents, rest


def _run(name: str, coded: Coded, *targets: ctypes.c_void_p) -> None:
    """One decoder of the library. `targets`: bytes beside the stream, if any, and where the result goes, last."""
    table = decoding_table(coded.code)
    beside, result = targets[:-1], targets[-1]
    status = getattr(library(), name)(
        _at(coded.stream),
        _long(coded.stream.numel()),
        _at(coded.lengths),
        _at(table),
        *beside,
        _long(coded.count),
        result,
        torch.get_num_threads(),
    )
    check(status, f"decoding {coded.count} symbols of at most {LONGEST} bits")


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _long(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)
