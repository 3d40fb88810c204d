"""The matmul with a weight whose rows have tables of their own, on a CPU: codebooks and bit planes.

    y_MN = x_MK @ W_NK.T,    W[n, k] = table[n, group of k][code[n, k]]        activations in bfloat16

Bytes of four rows are looked up at once, each row in its own table, and interleaved to bfloat16 (kernels/native/own_kernel.h).
Sixteen tokens share one decoding; four where the processor does not multiply bfloat16 and numbers become float32. Codebooks
(SqueezeLLM) have one table a row; q planes of a group are 2^q numbers, whatever their scales and offsets are, and where runs of
outputs share scales they share tables, for as few as eight inputs. Numbers are rounded to bfloat16 once; other types of
activations, where that would be seen, run on `cpu_lookup` and `plane_rows`. Codes have 1 to 4 bits; more planes are two halves
side by side, whose inputs are handed over twice.

Layout: `aerogel.pack.own_tables`. Shape legend: M tokens, N out features, K in features, G groups along K.
"""

from __future__ import annotations

import ctypes
from typing import ClassVar

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.kernels.beside import cpu as beside_cpu
from aerogel.kernels.beside.ref import Beside
from aerogel.kernels.gemm.cpu_lookup import call_of
from aerogel.kernels.gemm.cpu_operators import operator
from aerogel.kernels.native import library
from aerogel.kernels.problem import Kernel, Layout, Problem
from aerogel.pack import own_tables
from aerogel.quantize.codes import Codes, Grid
from aerogel.quantize.planes import PlaneGrid
from aerogel.quantize.tables import TableGrid


class NativeOwn(Kernel):
    """Compiled CPU kernel for codes into tables of each row and group."""

    about: ClassVar[str] = "compiled for the CPU, activations in bfloat16: codebooks of each row, and bit planes"
    adds_beside: ClassVar[bool] = True

    @staticmethod
    def refuses(problem: Problem) -> str | None:
        """Anything but such tables with activations in bfloat16 on a CPU."""
        return (
            problem.needs_device("cpu")
            or problem.needs_numbers(PlaneGrid, TableGrid)
            or _refuses_table(problem.grid)
            or problem.needs_activations("none")
            or problem.needs_dtype(torch.bfloat16)
            or own_tables.refused(problem.grid, problem.K)
            or library.missing()
            or _better_looked_up(problem.grid)
        )

    @staticmethod
    def pack(codes: Codes, problem: Problem) -> dict[str, Tensor]:
        """See `aerogel.pack.own_tables`."""
        return own_tables.tensors_of(codes)

    @staticmethod
    def unpack(layout: Layout, problem: Problem) -> Codes:
        """The same codes, scales, tables and offsets."""
        return own_tables.codes_of(layout, problem.grid, problem.N, problem.K)

    @staticmethod
    def run(x_MK: Tensor, layout: Layout, problem: Problem, bias_N: Tensor | None = None) -> Tensor:
        """One call of the library."""
        grid, columns = own_tables.laid(problem.grid, problem.K)
        if columns == problem.K:
            return product(x_MK, layout, bias_N, problem.N, *tables_of(grid, columns))
        held, beside = {name: layout[name] for name in TENSORS}, Beside.among(layout)
        y_MN = product(own_tables.twice(x_MK, columns), held, bias_N, problem.N, *tables_of(grid, columns))
        return y_MN if beside is None else beside_cpu.add(y_MN, x_MK, beside)


def _refuses_table(grid: Grid) -> str | None:
    if isinstance(grid, TableGrid) and not grid.learned:
        return "runs codebooks of each output and bit planes, not tables that all outputs share"
    if isinstance(grid, TableGrid) and grid.bits > own_tables.MOST_BITS:
        return f"runs codebooks of at most {own_tables.MOST_BITS} bits, found {grid.bits}"
    return None


def _better_looked_up(grid: Grid) -> str | None:
    """Codebooks where integers of 15 bits take fewer instructions than floats."""
    if isinstance(grid, PlaneGrid) or library.best("exact") in library.BFLOAT16_PATHS:
        return None
    return "codebooks are faster by lookups of bytes where no bfloat16 is multiplied"


def tables_of(grid: Grid, K: int) -> tuple[int, int]:
    """`group` and `shared` of `linear` for codes on this grid."""
    shared = own_tables.shared_rows(grid, K)
    return 0 if shared else grid.group_size or 0, shared


def linear(
    x_MK: Tensor,
    layout: Layout,
    bias_N: Tensor | None,
    N: int,
    group: int,
    shared: int = 0,
    path: int = -1,
    threads: int | None = None,
) -> Tensor:
    """x @ W.T (+ bias), bfloat16 [M, N], through the compiled kernel.

    Args:
        x_MK: bfloat16 [M, K], contiguous; K the columns that are laid out.
        layout: the tensors of `aerogel.pack.own_tables`, and what is added (`beside.ref.NAMES`).
        bias_N: [N] of any of the three types, or None.
        N, group: out features; columns that share a table, 0 for all.
        shared: outputs that share tables, which hold for eight columns then (and `group` is 0); 0: each has its own.
        path: an index of `library.PATHS`, -1 for the best this machine has.
        threads: torch's number of threads unless given.

    Raises:
        BadInput: tensors whose sizes, types or alignment do not agree. Nothing has been read then.
    """
    M, K = x_MK.shape
    y_MN = torch.empty(M, N, dtype=x_MK.dtype)
    weight = struct_of(layout, N, K, group, shared)
    call = call_of(x_MK, bias_N, y_MN, "exact", path, threads, Beside.among(layout))
    status = library.library().aerogel_native_own(ctypes.byref(weight), ctypes.byref(call))
    library.check(status, f"a weight of tables for each row [{N}, {K}]")
    return y_MN


TENSORS = ("codes", "table")
"""What of a layout the library reads."""
product = operator("native_own_tables", TENSORS, linear)


def struct_of(layout: Layout, N: int, K: int, group: int, shared: int = 0) -> library.OwnTables:
    """The weight as the library takes it, valid while the tensors live. Raises `BadInput` for other tensors."""
    codes, table = layout["codes"], layout["table"]
    for tensor in (codes, table):
        if not tensor.is_contiguous() or not tensor.is_cpu or tensor.dtype != torch.uint8:
            raise BadInput(f"a CPU matmul wants contiguous uint8 tensors in main memory, found {tensor.dtype}")
    where, sizes = (codes.data_ptr(), table.data_ptr()), (codes.nbytes, table.nbytes)
    return library.OwnTables(*where, *sizes, N, K, group, shared, codes.shape[-1] // 64)
