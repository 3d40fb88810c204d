"""One 4-bit linear on the CPU beside torch's dense and int4 operators, and the bandwidth that bounds it.

    python benchmarks/cpu_gemm.py                                       all shapes, M = 1, 16, 512
    python benchmarks/cpu_gemm.py --bits 2 3 4 8 --shapes 4096x4096     other widths

Microseconds are medians; within a round every contender has one turn, so drift hits all alike, and ratios are medians of the
rounds' ratios. A turn is two calls, of which the second is timed: the first wakes the threads, which sleep while others have
their turns, and in a model they do not. Each contender rotates over copies of its weight that together exceed the last-level
cache, so no call finds its weight there. The dense baselines are bfloat16, which is what a checkpoint stores, and float32,
faster where the processor has no bfloat16 products; `over_fastest_dense` compares with whichever of the two had the smaller
median.

For one token, a product is held against reading alone, in rounds of their own that hold nothing else: as many bytes as the
weight has, read by the same threads from copies as cold as the weight's; the product, one call of the compiled library as a
model's list of operations makes it; and LONG_BYTES in one go, which pays for no start and no end. Both are read in four streams
for each thread, which is faster than one. `share_of_read` and `share_of_bandwidth` are medians of the rounds' ratios to the
first and to the last, with their quartiles: the bandwidth of a machine that others use as well moves by half within minutes,
and both sides of a ratio must see it.

# make bench: --seconds 1 --shapes 4096x4096
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from aerogel.eval.machine import machine
from aerogel.kernels.dispatch import kernel
from aerogel.kernels.gemm.cpu import Native, structs
from aerogel.kernels.native import library
from aerogel.kernels.problem import Problem
from aerogel.quantize.grids import Codes, IntGrid

RESULTS = Path(__file__).parent / "results"
COPY_BYTES = 96 << 20
"""Three times the last-level cache of the machine this was written on."""
LONG_BYTES = 128 << 20
DENSE = ("dense-bf16", "dense-fp32")


def codes_of(N: int, K: int, bits: int, group: int) -> Codes:
    random = torch.Generator().manual_seed(0)
    low = -(1 << (bits - 1))
    values = torch.randint(low, -low, (N, K), dtype=torch.int8, generator=random)
    grid = IntGrid(bits=bits, group_size=group, scale_dtype=torch.bfloat16)
    return Codes(values_NK=values, scale_NG=torch.rand(N, K // group, generator=random).bfloat16(), zero_NG=None, grid=grid)


def copies(layout: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    size = sum(tensor.nbytes for tensor in layout.values())
    return [{name: tensor.clone() for name, tensor in layout.items()} for _ in range(min(16, -(-COPY_BYTES // size)))]


class Contender(NamedTuple):
    """name: of the kernel, where it is ours. run: a turn by its number. size: of the weight in bytes. held: its copies."""

    name: str
    run: Callable[[int], Any]
    size: int
    held: list[dict[str, torch.Tensor]]


def contenders(N: int, K: int, bits: int, group: int, x: torch.Tensor) -> dict[str, Contender]:
    """By name."""
    codes = codes_of(N, K, bits, group)
    found: dict[str, Contender] = {}

    def add(name: str, run: Callable[[dict[str, torch.Tensor]], Any], layout: dict[str, torch.Tensor]) -> None:
        held = copies(layout)
        size = sum(tensor.nbytes for tensor in layout.values())
        found[name] = Contender(name, lambda i: run(held[i % len(held)]), size, held)

    for name in ("cpu", "cpu-int8", "torch-int4-cpu"):
        problem = Problem(format="pack-quantized", grid=codes.grid, N=N, K=K, dtype=x.dtype, fast=name == "cpu-int8")
        ours = kernel(name)
        if ours.refuses(problem) is None:
            layout = ours.pack(codes, problem)
            add(name, lambda held, ours=ours, problem=problem: ours.run(x, held, problem), layout)  # type: ignore[misc]
    if bits == 8:
        w8a8(N, K, x, add)
    wide = x.float()
    add("dense-bf16", lambda held: x @ held["weight"].T, {"weight": codes.decode(torch.bfloat16)})
    add("dense-fp32", lambda held: wide @ held["weight"].T, {"weight": codes.decode(torch.float32)})
    return found


def w8a8(N: int, K: int, x: torch.Tensor, add: Callable[..., None]) -> None:
    """int8 weights per channel with int8 activations per token: ours, torch's integer product, and its quantized operator."""
    random = torch.Generator().manual_seed(0)
    values = torch.randint(-127, 128, (N, K), dtype=torch.int8, generator=random)
    codes = Codes(values_NK=values, scale_NG=torch.rand(N, 1, generator=random), zero_NG=None, grid=IntGrid(bits=8))
    for name in ("cpu-int8-dynamic", "torch-int8-dynamic"):
        problem = Problem(format="int-quantized", grid=codes.grid, N=N, K=K, dtype=x.dtype, activations="int8")
        ours = kernel(name)
        layout = ours.pack(codes, problem)
        add(name, lambda held, ours=ours, problem=problem: ours.run(x, held, problem), layout)
    scale, zero = codes.scale_NG[:, 0].double(), torch.zeros(N, dtype=torch.long)
    quantized = torch._make_per_channel_quantized_tensor(values, scale, zero, 0)
    packed, wide = torch.ops.quantized.linear_prepack(quantized, None), x.float()
    # Its weight cannot be copied, so this one may stay in the cache.
    add("torch-quantized-int8", lambda _: torch.ops.quantized.linear_dynamic(wide, packed, False), {"weight": values})


def measure(N: int, K: int, M: int, bits: int, group: int, seconds: float) -> dict[str, Any]:
    """Microseconds of each contender, and ratios dense / contender."""
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(M)).bfloat16()
    running = contenders(N, K, bits, group, x)
    times: dict[str, list[float]] = {name: [] for name in running}
    end = time.perf_counter() + seconds
    for number in range(-1, 1000):
        if number >= 3 and time.perf_counter() > end:
            break
        for name, (_, run, _, _) in running.items():
            run(2 * number + 2)
            start = time.perf_counter()
            run(2 * number + 3)
            if number >= 0:
                times[name].append(time.perf_counter() - start)
    row: dict[str, Any] = {"N": N, "K": K, "M": M, "bits": bits, "group": group, "rounds": len(times["cpu"])}
    if M == 1:
        row["reading"] = {name: shares(x, N, group, running[name], seconds) for name in ("cpu", "cpu-int8") if name in running}
    fastest = min(DENSE, key=lambda name: statistics.median(times[name]))
    for name, taken in times.items():
        over, over_fastest = (ratio(times[dense], taken) for dense in ("dense-bf16", fastest))
        middle = statistics.median(taken)
        rate = running[name].size / middle / 1e9
        row[name] = {"us": middle * 1e6, "over_dense": over, "over_fastest_dense": over_fastest, "GB_per_s": rate}
    return row


def shares(x: torch.Tensor, N: int, group: int, contender: Contender, seconds: float) -> dict[str, Any]:
    """Of a compiled product of one token: see the module's text."""
    threads, size, y = torch.get_num_threads(), contender.size, torch.empty(1, N, dtype=x.dtype)
    ours = kernel(contender.name)
    assert issubclass(ours, Native)
    numerics = library.NUMERICS[ours.numerics]
    calls = [structs(x, held["codes"], held["scale"], None, None, y, N, group, numerics) for held in contender.held]
    same = [torch.ones(size, dtype=torch.uint8) for _ in range(len(calls))]
    whole = torch.ones(LONG_BYTES, dtype=torch.uint8)
    rates: dict[str, list[float]] = {"read": [], "product": [], "long_read": []}
    end = time.perf_counter() + seconds
    for number in range(-1, 100000):
        if number >= 20 and time.perf_counter() > end:
            break
        library.read_bandwidth(same[2 * number % len(same)], threads)  # the first of two wakes the threads, here and below
        read = library.read_bandwidth(same[(2 * number + 1) % len(same)], threads)
        for turn in (2 * number, 2 * number + 1):
            weight, call = (ctypes.byref(struct) for struct in calls[turn % len(calls)])
            start = time.perf_counter()
            library.library().aerogel_native_gemm(weight, call)
            taken = time.perf_counter() - start
        found = {"read": read, "product": size / taken, "long_read": library.read_bandwidth(whole, threads)}
        for name, rate in found.items() if number >= 0 else ():
            rates[name].append(rate / 1e9)
    row: dict[str, Any] = {"rounds": len(rates["read"])} | {
        f"{name}_GB_per_s": statistics.median(seen) for name, seen in rates.items()
    }
    for name, other in (("share_of_read", "read"), ("share_of_bandwidth", "long_read")):
        ratios = [ours / theirs for ours, theirs in zip(rates["product"], rates[other], strict=True)]
        low, row[name], high = statistics.quantiles(ratios, n=4)
        row[f"{name}_quartiles"] = [low, high]
    return row


def ratio(dense: list[float], taken: list[float]) -> float:
    """Median over the rounds of dense / contender."""
    return statistics.median(slow / fast for slow, fast in zip(dense, taken, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "14336x4096", "4096x14336"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 512])
    parser.add_argument("--bits", nargs="+", type=int, default=[4])
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_gemm.json")
    given = parser.parse_args()
    rows = []
    for shape in given.shapes:
        N, K = map(int, shape.split("x"))
        for bits in given.bits:
            for M in given.tokens:
                row = measure(N, K, M, bits, given.group, given.seconds)
                rows.append(row)
                sys.stdout.write(json.dumps(row) + "\n")
    report = {
        "command": " ".join(["benchmarks/cpu_gemm.py", *sys.argv[1:]]),
        "machine": machine(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "path": {numerics: library.best(numerics) for numerics in library.NUMERICS},
        "rows": rows,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
