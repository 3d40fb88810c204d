"""What sparse outliers, with `--columns` kept columns, or with `--rows` rows of more bits add to the time of a packed linear.

    python benchmarks/outliers.py --out benchmarks/results/outliers.json
    python benchmarks/outliers.py --columns --out benchmarks/results/columns.json
    python benchmarks/outliers.py --rows --shares 0.1 --out benchmarks/results/rows.json

    python benchmarks/outliers.py --device cuda --shapes 4096x4096 28672x4096 --tokens 1 16 --shares 0.01 \
        --formats int4 nvfp4 mxfp4 --out ...

Columns stand beside int8 weights with int8 activations, outliers beside the format asked for, rows (of 8 bits) beside
int4; a share counts weights, inputs or outputs.

On a CPU: medians; within a round the linear runs once without and once with its outliers, on weights that rotate over more
than the last-level cache, and the ratio is the median of the rounds' ratios. On a GPU: replays of CUDA graphs that go round
over copies of the weight, with and without in turns, three times each, and the ratio of the medians. `--compile` only compiles
what that needs, several kernels at once.

# make bench: --seconds 1 --shapes 1024x1024
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from aerogel.eval.machine import machine, versions
from aerogel.kernels.cuda import sources
from aerogel.kernels.cuda.timing import copies, graph_microseconds
from aerogel.kernels.linear import Linear
from aerogel.kernels.sidecars import SidecarLinear
from aerogel.pack.format import Activations
from aerogel.quantize.codes import quantized
from aerogel.quantize.columns import Columns
from aerogel.quantize.formats.mx import Mx
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.formats.nvfp4 import Nvfp4
from aerogel.quantize.grids import Codes, Fp8Grid, IntGrid
from aerogel.quantize.outliers import Outliers
from aerogel.quantize.rows import Rows
from aerogel.quantize.tables import TableGrid

Maker = Callable[[int, int, float, int, str], tuple[Linear, SidecarLinear]]
CACHE = 96 << 20
GRID = IntGrid(bits=4, group_size=128, scale_dtype=torch.bfloat16)
FORMATS: dict[str, IntGrid | TableGrid | Fp8Grid] = {
    "int4": GRID,
    "nf4": Nf4(group_size=64),
    "mxfp4": Mx(),
    "nvfp4": Nvfp4(),
    "w8a8": IntGrid(bits=8, scale_dtype=torch.bfloat16),
    "fp8": Fp8Grid(scale_dtype=torch.bfloat16),
}
ROUNDED: dict[str, Activations] = {"w8a8": "int8", "fp8": "fp8"}
"""What outliers stand beside, and those that round their inputs too."""


def codes_of(name: str, N: int, K: int, random: torch.Generator, device: str) -> Codes:
    """Random codes in a format."""
    grid = FORMATS[name]
    if isinstance(grid, IntGrid):
        most = 1 << grid.bits - 1
        values = torch.randint(-most, most, (N, K), dtype=torch.int8, generator=random, device=device)
        scale = torch.rand(N, grid.groups(K), generator=random, device=device).bfloat16()
        return Codes(values_NK=values, scale_NG=scale, grid=grid)
    weight_NK = torch.randn(N, K, generator=random, device=device)
    return quantized(grid, weight_NK, grid.fit(weight_NK))


def pair(name: str, N: int, K: int, share: float, seed: int, device: str = "cpu") -> tuple[Linear, SidecarLinear]:
    """The same codes without outliers and with."""
    random = torch.Generator(device).manual_seed(seed)
    codes = codes_of(name, N, K, random, device)
    weight_NK = torch.randn(N, K, generator=random, device=device).bfloat16()  # as checkpoints have them
    outliers = Outliers.of(weight_NK, torch.rand(N, K, generator=random, device=device) < share)
    activations = ROUNDED.get(name, "none")
    kept = SidecarLinear.from_codes(codes, activations=activations, dtype=torch.bfloat16)
    kept.keep(outliers.tensors())
    return Linear.from_codes(codes, activations=activations, dtype=torch.bfloat16), kept


def pair_of_columns(N: int, K: int, share: float, seed: int, device: str = "cpu") -> tuple[Linear, SidecarLinear]:
    """The same int8 codes without columns and with."""
    random = torch.Generator(device).manual_seed(seed)
    values = torch.randint(-127, 128, (N, K), dtype=torch.int8, generator=random, device=device)
    grid = IntGrid(bits=8, scale_dtype=torch.bfloat16)
    codes = Codes(values_NK=values, scale_NG=torch.rand(N, 1, generator=random, device=device).bfloat16(), grid=grid)
    index_C = torch.randperm(K, generator=random, device=device)[: round(share * K)]
    kept = SidecarLinear.from_codes(codes, activations="int8", dtype=torch.bfloat16)
    kept.keep(Columns.of(torch.randn(N, K, generator=random, device=device), index_C).tensors())
    return Linear.from_codes(codes, activations="int8", dtype=torch.bfloat16), kept


def pair_of_rows(N: int, K: int, share: float, seed: int, device: str = "cpu") -> tuple[Linear, SidecarLinear]:
    """The same 4-bit codes without and with 4 more bits for some rows."""
    random = torch.Generator(device).manual_seed(seed)
    index_R = torch.randperm(N, generator=random, device=device)[: round(share * N)].sort().values

    def codes(rows: int) -> Codes:
        values = torch.randint(-8, 8, (rows, K), dtype=torch.int8, generator=random, device=device)
        return Codes(
            values_NK=values, scale_NG=torch.rand(rows, K // 128, generator=random, device=device).bfloat16(), grid=GRID
        )

    base = codes(N)
    kept = SidecarLinear.from_codes(base, dtype=torch.bfloat16)
    kept.keep(Rows.of(index_R, codes(len(index_R))).tensors()).prepare()
    return Linear.from_codes(base, dtype=torch.bfloat16), kept


def measure(N: int, K: int, M: int, share: float, seconds: float, make: Maker) -> dict[str, Any]:
    """Microseconds without and with on a CPU, and their ratio."""
    pairs = [make(N, K, share, seed, "cpu") for seed in range(max(2, -(-CACHE // (N * K // 2))))]
    x_MK = torch.randn(M, K, generator=torch.Generator().manual_seed(M)).bfloat16()
    times: list[tuple[float, float]] = []
    end, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turn < 8 * len(pairs):
        taken = []
        for module in pairs[turn % len(pairs)]:
            start = time.perf_counter()
            module(x_MK)
            taken.append(time.perf_counter() - start)
        turn += 1
        if turn > 2 * len(pairs):
            times.append((taken[0], taken[1]))
    plain, kept = (statistics.median(column) * 1e6 for column in zip(*times, strict=True))
    ratio = statistics.median(b / a for a, b in times)
    row = {"N": N, "K": K, "M": M, "share": share, "plain_us": round(plain, 1), "with_us": round(kept, 1)}
    return {**row, "ratio": round(ratio, 3), "kernel": pairs[0][0].kernel_name, "rounds": len(times)}


def compiled(N: int, K: int, tokens: Sequence[int], share: float, make: Maker) -> tuple[Linear, SidecarLinear]:
    """The first pair, with all that running it needs."""
    first = make(N, K, share, 0, "cuda")
    for (kernel, device), weights in Linear.by_kernel(torch.nn.ModuleList(first)).items():
        sources.load_all([(wanted, device) for wanted in kernel.wanted(weights, tokens, device)])
    return first


def measure_cuda(N: int, K: int, tokens: Sequence[int], share: float, make: Maker) -> Iterator[dict[str, Any]]:
    """The same on a GPU, for several numbers of tokens."""
    first = compiled(N, K, tokens, share, make)
    pairs = [first, *(make(N, K, share, seed, "cuda") for seed in range(1, copies(first[0].packed_bytes)))]
    for M in tokens:
        x_MK = torch.randn(M, K, generator=torch.Generator("cuda").manual_seed(M), device="cuda").bfloat16()
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(3):
            for which, found in enumerate(times):
                found.append(graph_microseconds([partial(pair[which], x_MK) for pair in pairs]))
        plain, kept = map(statistics.median, times)
        row = {"N": N, "K": K, "M": M, "share": share, "plain_us": round(plain, 2), "with_us": round(kept, 2)}
        yield {**row, "ratio": round(kept / plain, 3), "kernel": first[0].kernel_name, "copies": len(pairs)}


def main() -> None:
    """Measures and prints."""
    options = argparse.ArgumentParser()
    options.add_argument("--shapes", nargs="+", default=["4096x4096"])
    options.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 128])
    options.add_argument("--shares", nargs="+", type=float, default=[0.0045, 0.01])
    options.add_argument("--seconds", type=float, default=4)
    options.add_argument("--formats", nargs="+", choices=FORMATS, default=["int4"])
    options.add_argument("--columns", action="store_true")
    options.add_argument("--rows", action="store_true")
    options.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options.add_argument("--compile", action="store_true")
    options.add_argument("--out", type=Path)
    chosen = options.parse_args()
    makers: dict[str, Maker] = {name: partial(pair, name) for name in chosen.formats}
    if chosen.rows or chosen.columns:
        makers = {"int4": pair_of_rows} if chosen.rows else {"int8": pair_of_columns}
    rows = []
    with torch.inference_mode():
        for (name, make), shape, share in itertools.product(makers.items(), chosen.shapes, chosen.shares):
            N, K = map(int, shape.split("x"))
            if chosen.compile:
                compiled(N, K, chosen.tokens, share, make)
                continue
            if chosen.device == "cuda":
                found = measure_cuda(N, K, chosen.tokens, share, make)
            else:
                found = (measure(N, K, M, share, chosen.seconds, make) for M in chosen.tokens)
            for row in found:
                rows.append({"format": name, **row})
                print(rows[-1], flush=True)
                if chosen.out:  # what has been measured stays, whatever becomes of the rest
                    held = {"command": " ".join(sys.argv), "machine": machine(), "versions": versions(), "rows": rows}
                    chosen.out.write_text(json.dumps(held, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
