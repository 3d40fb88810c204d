"""The matmul with a weight whose codes point into tables, on a CPU: numbers come from byte lookups in registers.

    W[n, k] = table[t][code[n, k]] * (s[n, g] * factor)        2 to 4 bits; one table, one per row, or one picked per group

NF4, floats of 3 and 4 bits with any scales (MXFP4, NVFP4), BitMoD and free tables take the same time, because every row of a
register has a table of its own (kernels/native/lookup.h). Groups of any size: what fills them up to whole steps of 16 columns
meets activations that are zero. Two kinds of arithmetic:

    float32, float16    products and sums in float32
    bfloat16            activations and numbers rounded to integers of 15 bits, with one scale per token and 128 columns (or a
                        group that takes 48 or 80) and one per table; products exact. The error is below 1.5e-4, 3e-4 where
                        one activation is 300 times the others; rounding the result to bfloat16 costs 2e-3.

Beyond eight tokens panels are decoded once for all of them, and products are in float32 whatever the activations are
(kernels/native/lookup_many.h). Layout: `aerogel.pack.lookup`.

Shape legend: M tokens, N out features, K in features, G groups along K, T tables.
"""

from __future__ import annotations

import ctypes
from typing import ClassVar

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.kernels.beside import cpu as beside_cpu
from aerogel.kernels.beside.ref import Beside
from aerogel.kernels.gemm.cpu_operators import operator
from aerogel.kernels.native import library
from aerogel.kernels.problem import Kernel, Layout, Problem
from aerogel.pack import lookup
from aerogel.quantize.codes import Codes, Grid
from aerogel.quantize.scales import TYPES
from aerogel.quantize.tables import TableGrid

BITS = (2, 3, 4)
NUMERICS = {"exact": 0, "fixed": 2}


class NativeLookup(Kernel):
    """Compiled CPU kernel for codes of 2 to 4 bits that point into tables."""

    about: ClassVar[str] = "compiled for the CPU: codes of 2 to 4 bits into any tables, by lookups of bytes"
    adds_beside: ClassVar[bool] = True

    @staticmethod
    def refuses(problem: Problem) -> str | None:
        """Anything but such a table on a CPU; everything where the library was not compiled."""
        return (
            problem.needs_device("cpu")
            or problem.needs_numbers(TableGrid)
            or _refuses_table(problem.grid)
            or problem.needs_activations("none")
            or problem.needs_dtype(*library.TYPES)
            or library.missing()
        )

    @staticmethod
    def pack(codes: Codes, problem: Problem) -> dict[str, Tensor]:
        """See `aerogel.pack.lookup`; the picks are checked here, and never again."""
        layout = lookup.tensors_of(codes)
        weight = struct_of(layout, problem.N, problem.K, problem.grid.group_size or 0)
        library.check(library.library().aerogel_native_lookup_check(ctypes.byref(weight)), "a weight of tables")
        return layout

    @staticmethod
    def unpack(layout: Layout, problem: Problem) -> Codes:
        """The same codes, scales, tables and factor."""
        grid = problem.grid
        per_row = "pick" not in layout and len(layout["number"]) > 1
        return lookup.codes_of(dict(layout), grid, problem.N, problem.K, per_row, getattr(grid, "two_level", False))

    @staticmethod
    def run(x_MK: Tensor, layout: Layout, problem: Problem, bias_N: Tensor | None = None) -> Tensor:
        """One call of the library."""
        return product(x_MK, layout, bias_N, problem.N, problem.grid.group_size or 0)


def _refuses_table(grid: Grid) -> str | None:
    if grid.bits not in BITS:
        return f"runs tables of {BITS[0]} to {BITS[-1]} bits, found {grid.bits}"
    if grid.shared_rows != 1 or grid.scale_dtype not in TYPES.values():
        return "wants scales for every output"
    return None


def numerics_of(dtype: torch.dtype) -> str:
    """The arithmetic for activations of this type."""
    return "fixed" if dtype == torch.bfloat16 else "exact"


def linear(
    x_MK: Tensor,
    layout: Layout,
    bias_N: Tensor | None,
    N: int,
    group: int,
    numerics: str,
    path: int = -1,
    threads: int | None = None,
) -> Tensor:
    """x @ W.T (+ bias), [M, N] in x's dtype, through the compiled kernel.

    Args:
        x_MK: float32, float16 or bfloat16 [M, K], contiguous.
        layout: the tensors of `aerogel.pack.lookup`, whose picks `NativeLookup.pack` has checked, and what is added
            (`beside.ref.NAMES`).
        bias_N: [N] of any of the three types, or None.
        N, group: out features; columns that share a scale, 0 for all.
        numerics: "exact" (float32 products) or "fixed" (15-bit integers, of up to eight tokens).
        path: an index of `library.PATHS`, -1 for the best this machine has.
        threads: torch's number of threads unless given.

    Raises:
        BadInput: tensors whose sizes, types or alignment do not agree. Nothing has been read then.
    """
    M, K = x_MK.shape
    y_MN = torch.empty(M, N, dtype=x_MK.dtype)
    weight = struct_of(layout, N, K, group)
    call = call_of(x_MK, bias_N, y_MN, numerics, path, threads, Beside.among(layout))
    status = library.library().aerogel_native_lookup(ctypes.byref(weight), ctypes.byref(call))
    library.check(status, f"a weight of tables [{N}, {K}]")
    return y_MN


def _product(x_MK: Tensor, layout: Layout, bias_N: Tensor | None, N: int, group: int) -> Tensor:
    return linear(x_MK, layout, bias_N, N, group, numerics_of(x_MK.dtype))


TENSORS = ("codes", "scale", "pick", "number", "fixed", "unit", "factor")
"""What of a layout the library reads."""
product = operator("native_lookup", TENSORS, _product)


def struct_of(layout: Layout, N: int, K: int, group: int) -> library.Lookup:
    """The weight as the library takes it, valid while the tensors live. Raises `BadInput` for other tensors."""
    pick = layout.get("pick")
    held = [layout[name] for name in ("codes", "scale", "number", "fixed", "unit")]
    if any(not tensor.is_contiguous() or not tensor.is_cpu for tensor in held):
        raise BadInput("a CPU matmul wants contiguous tensors in main memory; call .contiguous() and .cpu() on them")
    codes, scale, number, fixed, unit = held
    if codes.dtype != torch.uint8 or scale.dtype not in library.SCALES or unit.dtype != torch.float32:
        raise BadInput(f"a weight of tables wants uint8 codes and float scales, found {codes.dtype} and {scale.dtype}")
    where = [None if tensor is None else tensor.data_ptr() for tensor in (codes, scale, pick, number, fixed, unit)]
    sizes = [0 if tensor is None else tensor.nbytes for tensor in (codes, scale, pick, number, fixed, unit)]
    factor = library.number(layout["factor"])
    return library.Lookup(*where, *sizes, N, K, group, len(number), factor, codes.shape[-1] // 64, library.SCALES[scale.dtype])


def call_of(
    x_MK: Tensor,
    bias_N: Tensor | None,
    y_MN: Tensor,
    numerics: str,
    path: int = -1,
    threads: int | None = None,
    beside: Beside | None = None,
) -> library.Call:
    """Activations, bias, result and what is added (`beside.cpu.fits`) as the library takes them, valid while the tensors live.

    Raises:
        BadInput: tensors that are not contiguous in main memory, or of other types than they must be.
    """
    kinds = library.TYPES
    for tensor in (x_MK, y_MN, *([] if bias_N is None else [bias_N])):
        if tensor.dtype not in kinds or not tensor.is_contiguous() or not tensor.is_cpu:
            raise BadInput(f"a CPU matmul wants contiguous float tensors in main memory, found {tensor.dtype}; cast it")
    return library.Call(
        x_MK.data_ptr(),
        None if bias_N is None else bias_N.data_ptr(),
        y_MN.data_ptr(),
        x_MK.nbytes,
        y_MN.nbytes,
        0 if bias_N is None else bias_N.nbytes,
        len(x_MK),
        kinds[x_MK.dtype],
        0 if bias_N is None else kinds[bias_N.dtype],
        NUMERICS[numerics],
        path,
        threads or library.threads(),
        None if beside is None else ctypes.pointer(beside_cpu.part_of_weight(beside)),
    )
