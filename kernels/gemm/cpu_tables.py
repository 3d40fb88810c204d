"""The matmul with a weight whose codes point into tables that all outputs share, on a CPU: other numbers in integers' loops.

    W[n, k] = table[pick[n, g]][code[n, k]] * (s[n, g] * factor)        1 to 8 bits, any group size

One table, or two and those that are their negatives, as BitMoD's are.
The loops for exact integers look their numbers up in registers anyway where the processor multiplies bfloat16; here the numbers
are a table's. FP8 (e4m3 per channel, tensor or block), e5m2, RF8, FP6, FP5, FP4, FP3, MX and NVFP4 are numbers that bfloat16
holds exactly, so their products are exact like those of integers. NF4 and the like are rounded to it (about 1e-3 of the
result's norm, where rounding the result to bfloat16 costs 1.7e-3), for activations in bfloat16 only: others are multiplied
in float32.
Without such a product the two bytes of a small float and of RF8 as bfloat16 are looked up (AVX2), or floats decoded by
arithmetic, and other numbers gathered from memory; up to 4 bits are left to `cpu_lookup` there.
With `activations: fp8` the input is rounded first and then multiplied by the same loops.

Layout: `aerogel.pack.native_tables`. Shape legend: M tokens, N out features, K in features, G groups along K, T tables.
"""

from __future__ import annotations

import ctypes
from typing import ClassVar

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.kernels.beside import cpu as beside_cpu
from aerogel.kernels.beside.ref import Beside
from aerogel.kernels.gemm import cpu_lookup
from aerogel.kernels.gemm.cpu_operators import operator
from aerogel.kernels.gemm.ref import round_input
from aerogel.kernels.native import library
from aerogel.kernels.problem import Kernel, Layout, Problem
from aerogel.pack import native, native_tables
from aerogel.quantize.codes import Codes, Grid
from aerogel.quantize.grids import Fp8Grid
from aerogel.quantize.scales import TYPES
from aerogel.quantize.tables import TableGrid

MOST_PICKED = 2
"""Tables of a weight that picks among several, their mirrors aside (kernels/native/layout.h)."""
FLOAT32_PATHS = {"avx512bf16": "avx512", "amx": "avx512"}
"""For a path that multiplies bfloat16, the one of the same machine that multiplies float32."""


class NativeTables(Kernel):
    """Compiled CPU kernels for codes that point into shared tables."""

    about: ClassVar[str] = "compiled for the CPU: floats of 3 to 8 bits and other tables, in the loops of integers"
    rows: ClassVar[int] = native.STRIP
    adds_beside: ClassVar[bool] = True
    shared: ClassVar[frozenset[str]] = frozenset({"number", "table", "unit", "factor"})

    @staticmethod
    def refuses(problem: Problem) -> str | None:
        """Anything but such a table on a CPU, and tables that `cpu_lookup` is faster with."""
        return refused(problem) or _better_looked_up(problem)

    @staticmethod
    def pack(codes: Codes, problem: Problem) -> dict[str, Tensor]:
        """See `aerogel.pack.native_tables`."""
        return native_tables.tensors_of(codes)

    @staticmethod
    def unpack(layout: Layout, problem: Problem) -> Codes:
        """The same codes, scales, tables and factor."""
        return native_tables.codes_of(layout, problem.grid, problem.N, problem.K)

    @staticmethod
    def run(x_MK: Tensor, layout: Layout, problem: Problem, bias_N: Tensor | None = None) -> Tensor:
        """One call of the library."""
        group = problem.grid.group_size or 0
        if problem.activations == "none":
            return product(x_MK, layout, bias_N, problem.N, group)
        # What stands beside the weight meets inputs as they are, and kept columns' are no part of what is rounded.
        beside = Beside.among(layout)
        seen_MK = x_MK.float()
        if beside is not None and beside.index_C is not None:
            seen_MK = seen_MK.index_fill(1, beside.index_C.long(), 0)
        rounded_MK = round_input(seen_MK, problem, layout.get("input_scale")).to(x_MK.dtype).contiguous()
        held = {name: layout[name] for name in TENSORS if name in layout}
        y_MN = product(rounded_MK, held, bias_N, problem.N, group)
        return y_MN if beside is None else beside_cpu.add(y_MN, x_MK, beside)


def refused(problem: Problem) -> str | None:
    """Why these loops cannot run the problem, or None, whoever else could."""
    return (
        problem.needs_device("cpu")
        or problem.needs_numbers(TableGrid, Fp8Grid)
        or _refuses_table(problem.grid)
        or problem.needs_activations("none", "fp8", "fp8-static")
        or problem.needs_dtype(*library.TYPES)
        or library.missing()
    )


def _refuses_table(grid: Grid) -> str | None:
    """Tables that the layout does not hold."""
    if getattr(grid, "learned", False):
        return "runs tables that all outputs share, and these are fitted to each"
    tables = len(native_tables.table_of(grid))
    if tables > 1 and (grid.bits > 4 or tables != MOST_PICKED):
        return f"picks among {MOST_PICKED} tables of at most 4 bits and those that are their negatives"
    if grid.scale_dtype not in TYPES.values():
        return f"knows no scales in {grid.scale_dtype}"
    return None


def multiplies_bfloat16(problem: Problem) -> bool:
    """Whether numbers are looked up in registers here and multiplied with the problem's activations as they are."""
    return library.best("exact") in FLOAT32_PATHS and problem.dtype == torch.bfloat16


def _better_looked_up(problem: Problem) -> str | None:
    """Lookups of bytes beat what is not looked up in registers here."""
    if problem.grid.bits > 4 or multiplies_bfloat16(problem):
        return None
    return None if cpu_lookup.NativeLookup.refuses(problem) else "tables of up to 4 bits are faster by lookups of bytes here"


def linear(
    x_MK: Tensor, layout: Layout, bias_N: Tensor | None, N: int, group: int, path: int = -1, threads: int | None = None
) -> Tensor:
    """x @ W.T (+ bias), [M, N] in x's dtype, through the compiled kernel.

    Args:
        x_MK: float32, float16 or bfloat16 [M, K], contiguous.
        layout: the tensors of `aerogel.pack.native_tables`, and what is added (`beside.ref.NAMES`).
        bias_N: [N] of any of the three types, or None.
        N, group: out features; columns that share a scale, 0 for all.
        path: an index of `library.PATHS`, -1 for the best this machine has for these numbers.
        threads: torch's number of threads unless given.

    Raises:
        BadInput: tensors whose sizes, types or alignment do not agree. Nothing has been read then.
    """
    M, K = x_MK.shape
    y_MN = torch.empty(M, N, dtype=x_MK.dtype)
    weight, call = structs(x_MK, layout, bias_N, y_MN, N, group, path, threads, Beside.among(layout))
    status = library.library().aerogel_native_gemm(ctypes.byref(weight), ctypes.byref(call))
    library.check(status, f"a weight of tables [{N}, {K}]")
    return y_MN


TENSORS = ("codes", "scale", "table", "pick", "factor", "unit")
"""What of a layout the library reads."""
product = operator("native_tables", TENSORS, linear)


def structs(
    x_MK: Tensor,
    layout: Layout,
    bias_N: Tensor | None,
    y_MN: Tensor,
    N: int,
    group: int,
    path: int = -1,
    threads: int | None = None,
    beside: Beside | None = None,
) -> tuple[library.Weight, library.Call]:
    """What `linear` hands over, valid while the tensors live. Raises `BadInput` for tensors that no kernel reads."""
    weight = struct_of(layout, N, x_MK.shape[1], group)
    if path < 0 and x_MK.dtype != torch.bfloat16 and library.number(layout["unit"]) != 1.0:
        best = library.best("exact")
        path = library.PATHS.index(FLOAT32_PATHS.get(best, best))
    return weight, cpu_lookup.call_of(x_MK, bias_N, y_MN, "exact", path, threads, beside)


def struct_of(layout: Layout, N: int, K: int, group: int) -> library.Weight:
    """The weight as the library takes it, valid while the tensors live. Raises `BadInput` for other tensors."""
    codes, scale, table, pick = (layout.get(name) for name in ("codes", "scale", "table", "pick"))
    if codes is None or scale is None or table is None:
        raise BadInput("a weight of tables wants codes, scale and table; these tensors do not belong to this kernel")
    for tensor in (codes, scale, table, *([] if pick is None else [pick])):
        if not tensor.is_contiguous() or not tensor.is_cpu:
            raise BadInput("a CPU matmul wants contiguous tensors in main memory; call .contiguous() and .cpu() on them")
    if codes.dtype != torch.uint8 or scale.dtype not in library.SCALES or table.dtype != torch.float32:
        raise BadInput(f"a weight of tables wants uint8 codes and float scales, found {codes.dtype} and {scale.dtype}")
    where = (codes.data_ptr(), scale.data_ptr(), None, table.data_ptr(), None if pick is None else pick.data_ptr())
    sizes = (codes.nbytes, scale.nbytes, 0, table.nbytes, 0 if pick is None else pick.nbytes)
    factor = library.number(layout["factor"]) / library.number(layout["unit"])
    return library.Weight(*where, *sizes, N, K, group, factor, codes.shape[-1] // 64, library.SCALES[scale.dtype])
