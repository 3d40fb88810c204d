"""What the portable Triton kernels take for every kind of number, on a GPU: over 4-bit integers, and over decoding the weight.

    python benchmarks/gpu_portable_formats.py --out benchmarks/results/gpu_portable_formats.json    (half a minute of an H100)
    python benchmarks/gpu_portable_formats.py --compile           (builds what that needs into Triton's cache, several at once)

Median microseconds of `triton` over replays of a graph that goes round over >= 200 MB of copies of the weight, and of
`torch-chunked`, which runs what no kernel takes, called as it is (its decoding is no graph). bfloat16 activations. `over` is
the time over that of 4-bit integers in groups of 128 with as many tokens; `gain` is chunked's time over triton's.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch

from aerogel.eval.machine import machine, versions
from aerogel.kernels.cuda.timing import copies, graph_microseconds
from aerogel.kernels.gemm.torch_ops import Chunked
from aerogel.kernels.gemm.triton_linear import Triton
from aerogel.kernels.problem import Layout, Problem
from aerogel.pack.config import choose_format
from aerogel.quantize.codes import quantized
from aerogel.quantize.formats.affine import Affine
from aerogel.quantize.formats.bitmod import Bitmod
from aerogel.quantize.formats.floats import Float
from aerogel.quantize.formats.kmeans import KMeans
from aerogel.quantize.formats.mx import Mx
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.formats.nvfp4 import Nvfp4
from aerogel.quantize.formats.rf8 import Rf8
from aerogel.quantize.grids import Fp8Grid, IntGrid

HALF = torch.bfloat16
GRIDS: dict[str, Any] = {
    "int4 g128": IntGrid(bits=4, group_size=128, scale_dtype=HALF),
    "int4 floating zero g128": Affine(group_size=128, scale_dtype=HALF),
    "fp4 g128": Float(kind="e2m1", group_size=128, scale_dtype=HALF),
    "mxfp4 g32": Mx(),
    "nvfp4 g16": Nvfp4(),
    "nf4 g64": Nf4(group_size=64, scale_dtype=HALF),
    "bitmod4 g128": Bitmod(bits=4, group_size=128, scale_dtype=HALF),
    "kmeans4 per row": KMeans(bits=4, rounds=1, scale_dtype=HALF),
    "fp6 e2m3 per channel": Float(kind="e2m3", scale_dtype=HALF),
    "fp8 e4m3 per channel": Fp8Grid(scale_dtype=HALF),
    "mxfp8 g32": Mx(kind="e4m3"),
    "rf8 per channel": Rf8(scale_dtype=HALF),
}


@dataclass(frozen=True)
class Weight:
    """One weight of a format, as it is stored and as the kernel has it."""

    problem: Problem
    stored: Layout
    packed: Layout


def made(name: str, N: int, K: int) -> Weight:
    """A random weight on the GPU."""
    grid = GRIDS[name]
    w_NK = torch.randn(N, K, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    codes = quantized(grid, w_NK, grid.fit(w_NK))
    fmt = choose_format(grid)
    problem = Problem(format=fmt.name, grid=grid, N=N, K=K, dtype=HALF, device="cuda")
    stored = {local: tensor.cpu() if local == "weight_shape" else tensor for local, tensor in fmt.encode(codes).items()}
    return Weight(problem, stored, Triton.pack(codes, problem))


def triton_microseconds(weight: Weight, x_MK: torch.Tensor) -> float:
    """The kernel in a graph, a copy of the weight each time."""
    size = sum(tensor.nbytes for tensor in weight.packed.values())
    held = [weight.packed, *({n: t.clone() for n, t in weight.packed.items()} for _ in range(copies(size) - 1))]
    return graph_microseconds([lambda one=one: Triton.run(x_MK, one, weight.problem) for one in held])


def chunked_microseconds(weight: Weight, x_MK: torch.Tensor, calls: int = 5) -> float:
    """Decoding and multiplying, call by call."""
    times = []
    for _ in range(calls + 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        Chunked.run(x_MK, weight.stored, weight.problem)
        stop.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(stop))
    return median(times[1:])


def compile_one(given: tuple[str, int, int, list[int]]) -> None:
    """Builds what a format needs."""
    name, N, K, tokens = given
    weight = made(name, N, K)
    for M in tokens:
        Triton.run(torch.randn(M, K, device="cuda").to(HALF), weight.packed, weight.problem)
    torch.cuda.synchronize()


def measure(shape: str, tokens: list[int]) -> list[dict[str, Any]]:
    """Rows of all formats at one shape."""
    N, K = map(int, shape.split("x"))
    rows: list[dict[str, Any]] = []
    base: dict[int, float] = {}
    for name in GRIDS:
        weight = made(name, N, K)
        for M in tokens:
            x_MK = torch.randn(M, K, device="cuda").to(HALF)
            wanted = Chunked.run(x_MK, weight.stored, weight.problem).float()
            error = float((Triton.run(x_MK, weight.packed, weight.problem).float() - wanted).norm() / wanted.norm())
            us, chunked = triton_microseconds(weight, x_MK), chunked_microseconds(weight, x_MK)
            base.setdefault(M, us)
            row = {"format": name, "shape": shape, "M": M, "us": us, "chunked": chunked, "error": error}
            rows.append(row | {"over": us / base[M], "gain": chunked / us})
            line = f"{shape} {name:24s} M={M:<4}{us:8.1f} us  {us / base[M]:5.2f} of int4  chunked {chunked:9.1f}"
            sys.stdout.write(f"{line}  {chunked / us:6.1f}x  error {error:.1e}\n")
            sys.stdout.flush()
    return rows


def main() -> int:
    """Build, or measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "28672x4096"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 256])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--workers", type=int, default=4, help="processes that compile side by side")
    given = parser.parse_args()
    if given.compile:
        jobs = [(name, *map(int, shape.split("x")), given.tokens) for shape in given.shapes for name in GRIDS]
        with ProcessPoolExecutor(given.workers, get_context("spawn")) as pool:
            list(pool.map(compile_one, jobs))
        return 0
    rows = [row for shape in given.shapes for row in measure(shape, given.tokens)]
    command = f"--shapes {' '.join(given.shapes)} --tokens {' '.join(map(str, given.tokens))}"
    held = {"machine": machine(), "versions": versions(), "command": f"python benchmarks/gpu_portable_formats.py {command}"}
    if given.out:
        given.out.write_text(json.dumps(held | {"rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
