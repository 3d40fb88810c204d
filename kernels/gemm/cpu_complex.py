"""The matmul with complex codes on a CPU: five numbers in a table of eight.

    W[n, k] in {0, +s_0, -s_0, +s_1, -s_1},    s of parity (n + k) % 2        (`quantize/formats/complex.py`)

Two bits stand for four weights in the file; what they decode to takes three bits a weight here, six times the bytes, and runs
in the loops of `cpu_tables` as fast as integers of three bits, or in those of `cpu_lookup` where the processor does not
multiply bfloat16. Decoding a few rows for every product took 300 times that.

Layout: `aerogel.pack.native_tables` or `aerogel.pack.lookup`, one table for the weight and scales of 1.
Shape legend: N out features, K in features.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.kernels.gemm.cpu_lookup import NativeLookup
from aerogel.kernels.gemm.cpu_tables import NativeTables, multiplies_bfloat16
from aerogel.kernels.native import library
from aerogel.kernels.problem import Layout, Problem
from aerogel.pack import lookup, native_tables
from aerogel.quantize.codes import Codes
from aerogel.quantize.formats.complex import Complex
from aerogel.quantize.formats.floats import Float

TABLE = Float(kind="e1m1", group_size=None)
"""A grid whose codes are three bits into one table; the numbers are the weight's own."""


class NativeComplex(NativeTables):
    """The compiled loops for tables, with what complex codes stand for."""

    about: ClassVar[str] = "compiled for the CPU: complex codes as three bits a weight into a table of five numbers"
    rows: ClassVar[int] = 0  # weights with other scales have other tables

    @staticmethod
    def refuses(problem: Problem) -> str | None:
        """Anything but complex codes on a CPU, and what is faster by lookups of bytes."""
        return refused(problem) or _better_looked_up(problem)

    @staticmethod
    def pack(codes: Codes, problem: Problem) -> dict[str, Tensor]:
        """See `in_a_table` and `aerogel.pack.native_tables`."""
        return native_tables.tensors_of(in_a_table(codes))

    @staticmethod
    def unpack(layout: Layout, problem: Problem) -> Codes:
        """The same signs and scales."""
        return from_a_table(native_tables.codes_of(layout, TABLE, problem.N, problem.K), problem)


class LookedUpComplex(NativeLookup):
    """The compiled lookups of bytes, with what complex codes stand for."""

    about: ClassVar[str] = "compiled for the CPU: complex codes as three bits a weight into a table, by lookups of bytes"

    @staticmethod
    def refuses(problem: Problem) -> str | None:
        """Anything but complex codes on a CPU."""
        return refused(problem)

    @staticmethod
    def pack(codes: Codes, problem: Problem) -> dict[str, Tensor]:
        """See `in_a_table` and `aerogel.pack.lookup`."""
        return lookup.tensors_of(in_a_table(codes))

    @staticmethod
    def unpack(layout: Layout, problem: Problem) -> Codes:
        """The same signs and scales."""
        return from_a_table(lookup.codes_of(dict(layout), TABLE, problem.N, problem.K, False, False), problem)


def refused(problem: Problem) -> str | None:
    """Why no compiled loop can run the problem, or None."""
    return (
        problem.needs_device("cpu")
        or problem.needs_numbers(Complex)
        or problem.needs_activations("none")
        or problem.needs_dtype(*library.TYPES)
        or library.missing()
    )


def _better_looked_up(problem: Problem) -> str | None:
    return None if multiplies_bfloat16(problem) else "three bits are faster by lookups of bytes here"


def in_a_table(codes: Codes) -> Codes:
    """Sign and parity of every weight as a code: 0, 1 + 2 p for plus, 2 + 2 p for minus."""
    sign_NK, (real, imaginary) = codes.values_NK, codes.scale_NG[0].tolist()
    N, K = sign_NK.shape
    odd_NK = (torch.arange(N)[:, None] + torch.arange(K)) % 2
    values_NK = torch.where(sign_NK == 0, 0, torch.where(sign_NK > 0, 1, 2) + 2 * odd_NK).to(torch.uint8)
    table = torch.tensor([[0.0, real, -real, imaginary, -imaginary, 0.0, 0.0, 0.0]])
    return Codes(values_NK=values_NK, scale_NG=torch.ones(N, 1), table_TE=table, grid=TABLE)


def from_a_table(held: Codes, problem: Problem) -> Codes:
    """The inverse of `in_a_table`."""
    if held.table_TE is None:
        raise BadInput("complex codes lie in a table of their two scales; these have none")
    values_NK = held.values_NK
    sign_NK = torch.where(values_NK == 0, 0, torch.where(values_NK % 2 == 1, 1, -1)).to(torch.int8)
    return Codes(values_NK=sign_NK, scale_NG=held.table_TE[:, 1:4:2].contiguous(), grid=problem.grid)
