"""Which kernel runs a problem: the first in the table that does not refuse it.

The table is data, in order of preference. A kernel joins with one line here and a module that offers
`aerogel.kernels.problem.Kernel`; tests and benchmarks run over the table. A module whose optional library is missing
refuses with that as the reason, instead of breaking the others.
"""

from __future__ import annotations

from collections.abc import Mapping

from aerogel.kernels.grouped.kernel import Grouped
from aerogel.kernels.problem import Kernel, Problem
from aerogel.lazy import load

GEMM: dict[str, str] = {
    "cuda": "aerogel.kernels.gemm.cuda:Cuda",
    "cuda-int8": "aerogel.kernels.gemm.cuda_int8:CudaInt8",
    "cuda-fp8": "aerogel.kernels.gemm.cuda_fp8:CudaFp8",
    "cuda-rounded": "aerogel.kernels.gemm.cuda_rounded:CudaRounded",
    "cuda-groups": "aerogel.kernels.gemm.cuda_groups:CudaGroups",
    "cuda-plane": "aerogel.kernels.gemm.cuda_plane:CudaPlane",
    "cuda-planes": "aerogel.kernels.gemm.cuda_planes:CudaPlanes",
    "cpu-int8-dynamic": "aerogel.kernels.gemm.cpu:NativeDynamic",
    "torch-int8-dynamic": "aerogel.kernels.gemm.torch_ops:Int8Dynamic",
    "cpu-int8": "aerogel.kernels.gemm.cpu:NativeInt8",
    "cpu": "aerogel.kernels.gemm.cpu:Native",
    "cpu-tables": "aerogel.kernels.gemm.cpu_tables:NativeTables",
    "cpu-complex": "aerogel.kernels.gemm.cpu_complex:NativeComplex",
    "cpu-complex-lookup": "aerogel.kernels.gemm.cpu_complex:LookedUpComplex",
    "cpu-own-tables": "aerogel.kernels.gemm.cpu_own:NativeOwn",
    "cpu-lookup": "aerogel.kernels.gemm.cpu_lookup:NativeLookup",
    "cpu-planes": "aerogel.kernels.gemm.plane_rows:PlaneRows",
    "torch-int4-cpu": "aerogel.kernels.gemm.torch_ops:Int4Cpu",
    "torch-int8-cpu": "aerogel.kernels.gemm.torch_ops:Int8Cpu",
    "triton": "aerogel.kernels.gemm.triton_linear:Triton",
    "triton-planes": "aerogel.kernels.gemm.triton_planes:TritonPlanes",
    "torch-chunked": "aerogel.kernels.gemm.torch_ops:Chunked",
    "reference": "aerogel.kernels.gemm.ref:Reference",
}
"""Kernel name to `"module:Name"`, best first. The last two refuse nothing."""

GROUPED: dict[str, str] = {
    "cuda": "aerogel.kernels.grouped.cuda_grouped:Cuda",
    "cuda-int8": "aerogel.kernels.grouped.cuda_around:CudaInt8",
    "cuda-rounded": "aerogel.kernels.grouped.cuda_around:CudaRounded",
    "cuda-groups": "aerogel.kernels.grouped.cuda_around:CudaGroups",
    "cuda-plane": "aerogel.kernels.grouped.cuda_around:CudaPlane",
    "cuda-planes": "aerogel.kernels.grouped.cuda_around:CudaPlanes",
    "triton": "aerogel.kernels.grouped.triton_grouped:Triton",
    "cpu": "aerogel.kernels.grouped.cpu:Native",
    "cpu-tables": "aerogel.kernels.grouped.cpu:NativeTables",
    "each": "aerogel.kernels.grouped.each:Each",
    "reference": "aerogel.kernels.grouped.ref:Reference",
}
"""The same for the experts of a layer, each with the `Problem` of one expert. The last two refuse nothing."""


def kernel(name: str) -> type[Kernel]:
    """The kernel called `name`. Raises `KeyError` for an unknown one and what the import of its module raises."""
    found: type[Kernel] = load(GEMM[name])
    return found


def explain(problem: Problem) -> list[tuple[str, str | None]]:
    """Every kernel, best first, with the reason why it refuses the problem, or None where it would run it."""
    return [(name, _refusal(name, problem)) for name in GEMM]


def choose(problem: Problem) -> tuple[str, type[Kernel]]:
    """The name and class of the first kernel that runs the problem."""
    name = next(name for name in GEMM if _refusal(name, problem) is None)
    return name, kernel(name)


def explain_grouped(problem: Problem) -> list[tuple[str, str | None]]:
    """As `explain`, for the experts of a layer."""
    return [(name, _refusal(name, problem, GROUPED)) for name in GROUPED]


def choose_grouped(problem: Problem) -> tuple[str, type[Grouped]]:
    """The name and class of the first grouped kernel that runs the problem."""
    name = next(name for name in GROUPED if _refusal(name, problem, GROUPED) is None)
    found: type[Grouped] = load(GROUPED[name])
    return name, found


def _refusal(name: str, problem: Problem, table: Mapping[str, str] = GEMM) -> str | None:
    try:
        reason: str | None = load(table[name]).refuses(problem)
        return reason
    except ImportError as error:
        return f"cannot be imported here ({error})"
