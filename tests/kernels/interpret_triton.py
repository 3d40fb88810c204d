"""Run with TRITON_INTERPRET=1: the portable kernels on the CPU against float64, one line per failure, status 1 if any."""

from __future__ import annotations

import itertools
import sys

import torch
from tests.kernels.expert_weights import BOUND as GROUPED_BOUND
from tests.kernels.expert_weights import FLOATS, GRIDS, experts_of, routing, wanted_of
from tests.kernels.places import PLACES
from tests.kernels.rounding_cases import FEW_CASES, failures, force
from tests.kernels.word_weights import BOUND, KINDS, ROUNDED, applies, bound, error, weight_of
from tests.quantize.test_planes import GRIDS as PLANES
from tests.quantize.test_tables import GRIDS as TABLES
from tests.quantize.test_tables import weight

from aerogel.kernels.experts import stacked
from aerogel.kernels.gemm.ref import Reference
from aerogel.kernels.gemm.triton_linear import Triton
from aerogel.kernels.gemm.triton_planes import TritonPlanes
from aerogel.kernels.gemm.triton_words import Config, linear
from aerogel.kernels.grouped.triton_grouped import Triton as GroupedTriton
from aerogel.kernels.problem import Problem
from aerogel.pack.config import choose_format
from aerogel.quantize.formats.affine import Affine
from aerogel.quantize.formats.bitmod import Bitmod
from aerogel.quantize.formats.kmeans import KMeans
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.grids import Fp8Grid, IntGrid, quantized

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CUT = {torch.bfloat16: 1.2e-2}
"""The interpreter cuts a float32 off where it becomes bfloat16: twice the error of rounding, in numbers and in results."""
SMALL = Config(rows=32, tokens=16, split=1, warps=4, stages=2)
SHARES = Config(rows=16, tokens=16, split=3, warps=4, stages=2)


def widths() -> list[str]:
    """Every width with every kind of zero point, group and table; shapes that fill no block."""
    failed = []
    for bits, (place, kind) in itertools.product(range(1, 9), enumerate(KINDS)):
        if not applies(bits, kind) or ((bits + place) % 2):
            continue  # every width meets half of the kinds
        dtype, config = DTYPES[(bits + place) % 3], (SMALL, SHARES)[(bits + place) // 2 % 2]
        packed, dense = weight_of(37, 200, bits, kind)
        x = torch.randn(3, 200).to(dtype)
        bias = torch.randn(37).to(dtype) if place % 3 else None
        wanted = x.double() @ dense.T + (0 if bias is None else bias.double())
        given = (x, packed.codes, packed.scale, packed.zero, packed.table, packed.pick, bias, packed.group_size, 37, config)
        y = linear(*given)
        if not error(y, wanted) <= bound(kind, dtype):
            failed.append(f"{bits} bits {kind} {dtype} {config}: {error(y, wanted):.2e}")
    return failed


def shapes() -> list[str]:
    """Ragged and tiny shapes through the kernel's class, with what the dispatcher would choose."""
    failed = []
    grids = [IntGrid(bits=3, group_size=16, symmetric=False), IntGrid(bits=8), Fp8Grid(strategy="block")]
    for grid, (N, K) in itertools.product(grids, [(1, 1), (5, 130), (70, 256)]):
        dense = torch.randn(N, K, generator=torch.Generator().manual_seed(N))
        codes = quantized(grid, dense, grid.fit(dense))
        fmt = choose_format(grid, "none")
        problem = Problem(format=fmt.name, grid=grid, N=N, K=K)
        layout = Triton.pack(codes, problem)
        back = Triton.unpack(layout, problem)
        if not torch.equal(back.decode(), codes.decode()):
            failed.append(f"{grid} [{N}, {K}] does not invert")
        for M in (0, 17):
            x, bias = torch.randn(M, K), torch.randn(N)
            y = Triton.run(x, layout, problem, bias)
            wanted = Reference.run(x, fmt.encode(codes), problem, bias).double()
            if y.shape != wanted.shape or (M and not error(y, wanted) <= 1e-5):
                failed.append(f"{grid} [{M}, {N}, {K}]: {error(y, wanted):.2e}")
    return failed


def numbers() -> list[str]:
    """Every kind of table, float and scale through the kernel's class, against what the codes decode to."""
    failed = []
    for place, grid in enumerate([*TABLES, Affine(bits=1, group_size=16), Affine(bits=3, group_size=None)]):
        N, K, dtype = 21, 144, DTYPES[place % 3]
        if (grid.group_size or 16) % 16:
            continue
        dense = weight(N, K, place)
        codes = quantized(grid, dense, grid.fit(dense))
        problem = Problem(format=choose_format(grid).name, grid=grid, N=N, K=K, dtype=dtype)
        layout = Triton.pack(codes, problem)
        if not torch.equal(Triton.unpack(layout, problem).decode(), codes.decode()):
            failed.append(f"{grid} does not invert")
        x = torch.randn(3, K).to(dtype)
        found = error(Triton.run(x, layout, problem), x.double() @ codes.decode().double().T)
        if not found <= (ROUNDED | CUT)[dtype]:
            failed.append(f"{grid} {dtype}: {found:.2e}")
    return failed


def planes() -> list[str]:
    """Bit planes as rows of one-bit integers: the sums of planes are not rounded one by one."""
    failed = []
    for place, grid in enumerate(PLANES):
        N, K, dtype = 21, 144, DTYPES[place % 3]
        if (grid.group_size or 16) % 16:
            continue
        dense = weight(N, K, place)
        codes = quantized(grid, dense, grid.fit(dense))
        problem = Problem(format="planes", grid=grid, N=N, K=K, dtype=dtype)
        layout = TritonPlanes.pack(codes, problem)
        if not torch.equal(TritonPlanes.unpack(layout, problem).decode(), codes.decode()):
            failed.append(f"{grid} does not invert")
        x, bias = torch.randn(3, K).to(dtype), torch.randn(N)
        found = error(TritonPlanes.run(x, layout, problem, bias), x.double() @ codes.decode().double().T + bias.double())
        if not found <= BOUND[dtype] + 1e-6:
            failed.append(f"{grid} {dtype}: {found:.2e}")
    return failed


def not_numbers() -> list[str]:
    """Infinities and NaN of one token reach its outputs and no others."""
    packed, _ = weight_of(20, 200, 4, KINDS[0])
    x = torch.randn(3, 200)
    x[1, 150] = torch.inf
    x[2, 7] = torch.nan
    y = linear(x, packed.codes, packed.scale, None, None, None, None, packed.group_size, 20, SMALL)
    right = bool(y[0].isfinite().all()) and not y[1].isfinite().any() and bool(y[2].isnan().all())
    return [] if right else [f"infinities and NaN do not propagate: {y}"]


def anywhere() -> list[str]:
    """Inputs and biases that are misaligned or strided give the same bits, without experts and with."""
    weight, _ = weight_of(37, 200, 4, KINDS[0])
    given = (weight.codes, weight.scale, None, None, None)
    call, x, bias = torch.ops.aerogel.words_linear.default, torch.randn(3, 200), torch.randn(1, 37)
    wanted = call(x, *given, bias[0], weight.group_size, 37)
    failed = [
        f"words {place.__name__}"
        for place in PLACES
        if not torch.equal(call(place(x), *given, place(bias)[0], weight.group_size, 37), wanted)
    ]
    layer, expert, x, bias = (
        experts_of(GRIDS[0], 5, 21, 150, torch.float32),
        routing(11, 3, 5),
        torch.randn(11, 150),
        torch.randn(5, 21),
    )
    problem = layer.problem(torch.float32)
    packed = stacked(lambda e: GroupedTriton.base.pack(layer.codes_of(e), problem), 5)
    wanted = GroupedTriton.run(x, expert, GroupedTriton.route(expert, 5), packed, problem, bias)
    for place in PLACES:
        placed = place(expert[None].double()).long()[0]
        y = GroupedTriton.run(place(x), placed, GroupedTriton.route(placed, 5), packed, problem, place(bias))
        if not torch.equal(y, wanted):
            failed.append(f"grouped words {place.__name__}")
    return failed


def compiled() -> list[str]:
    """`torch.compile` traces through the operator without a break."""
    packed, _ = weight_of(20, 128, 4, KINDS[0])
    given = (packed.codes, packed.scale, None, None, None, None, 128, 20)
    call, x = torch.ops.aerogel.words_linear.default, torch.randn(3, 128)
    traced = torch.compile(lambda x: call(x, *given) + 1, fullgraph=True, backend="aot_eager")
    return [] if torch.equal(traced(x), call(x, *given) + 1) else ["compiled and called differ"]


def grouped() -> list[str]:
    """Experts, sorted and not, against the dense weights pair by pair; tokens that share experts, and pairs for nobody."""
    failed = []
    for (place, grid), (M, k) in itertools.product(
        enumerate([*GRIDS, *FLOATS, Nf4(group_size=48), KMeans(bits=3, rounds=2), Bitmod(group_size=48)]), [(1, 2), (11, 3)]
    ):
        dtype = DTYPES[(place + M) % 3]
        layer = experts_of(grid, 5, 21, 150, torch.float32)
        problem = layer.problem(dtype)
        packed = stacked(lambda e: GroupedTriton.base.pack(layer.codes_of(e), problem), 5)  # noqa: B023
        expert, bias = routing(M, k, 5), torch.randn(5, 21).to(dtype) if place % 2 else None
        rows = (M, M * k)[(place + k) % 2]  # an input for each token, or for each pair; which does not depend on the numbers
        x = torch.randn(rows, 150).to(dtype)
        y = GroupedTriton.run(x, expert, GroupedTriton.route(expert, 5), packed, problem, bias)
        wanted = wanted_of(layer, x, expert, bias)
        if not error(y, wanted) <= (GROUPED_BOUND | CUT)[dtype]:
            failed.append(f"{grid} {M} tokens {list(x.shape)} {dtype}: {error(y, wanted):.2e}")
    return failed


def rounding() -> list[str]:
    """Sweeps of a solver, columns decided in runs against columns decided one by one."""
    force()
    return failures("cpu", FEW_CASES)


def main() -> int:
    torch.manual_seed(0)
    failed = [*widths(), *shapes(), *numbers(), *planes(), *not_numbers(), *anywhere(), *compiled(), *grouped(), *rounding()]
    print("\n".join(failed) or "as float64 says")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
