"""Entropy decoding on NVIDIA GPUs (kernels/cuda/entropy.cu): one thread for each run of 256 symbols.

Shape legend: n symbols, R runs.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from aerogel.kernels.entropy.ref import Coded, decoding_table

SOURCE, KERNEL, THREADS, RUN = "entropy.cu", "entropy_decode", 128, 256


class Arguments(ctypes.Structure):
    """`Arguments` of entropy.cu, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("stream", "ends", "lengths", "table", "rest", "out")),
        ("count", ctypes.c_longlong),
    ]


class Decoding:
    """One coded tensor, ready to be decoded again and again on the device of its stream.

    The table, the ends of the runs and a stream that ends in whole words are made once.
    """

    def __init__(self, coded: Coded, rest: Tensor | None = None) -> None:
        from aerogel.kernels.cuda.sources import function

        coded.check()
        device = coded.stream.device
        with torch.cuda.device(device):
            self._function = function(SOURCE, KERNEL, {"BFLOAT16": int(rest is not None)}, device)
        self._stream = torch.nn.functional.pad(coded.stream, (0, 8 + -coded.stream.numel() % 4))
        self._ends = coded.lengths.long().cumsum(0)
        self._lengths, self._rest = coded.lengths, None if rest is None else rest.contiguous()
        self._table = decoding_table(coded.code.cpu()).to(device)
        self.count, self.device = coded.count, device

    def __call__(self, out: Tensor) -> Tensor:
        """Fills `out`, contiguous, `count` numbers: bfloat16 where there is `rest`, else uint8."""
        from aerogel.kernels.cuda.launch import Launch

        if self.count == 0:
            return out
        arguments = Arguments(
            stream=self._stream.data_ptr(),
            ends=self._ends.data_ptr(),
            lengths=self._lengths.data_ptr(),
            table=self._table.data_ptr(),
            rest=None if self._rest is None else self._rest.data_ptr(),
            out=out.data_ptr(),
            count=self.count,
        )
        with torch.cuda.device(self.device):
            launch = Launch(self._function, arguments, grid=(-(-self.count // (RUN * THREADS)),), block=THREADS)
            launch(torch.cuda.current_stream(self.device).cuda_stream)
        return out


def decode(coded: Coded) -> Tensor:
    """The bytes back, uint8 [n]."""
    return Decoding(coded)(torch.empty(coded.count, dtype=torch.uint8, device=coded.stream.device))


def decode_bfloat16(coded: Coded, rest: Tensor, out: Tensor | None = None) -> Tensor:
    """Numbers from coded exponents and signs and mantissas, bfloat16 [n], decoded into `out` where it is given."""
    numbers = torch.empty(coded.count, dtype=torch.bfloat16, device=coded.stream.device) if out is None else out
    return Decoding(coded, rest)(numbers)
