"""Numbers that are no integers, on a GPU, against integers that read as many bytes.

    python benchmarks/gpu_numbers.py --out benchmarks/results/gpu_numbers.json            (a minute of an H100)
    python benchmarks/gpu_numbers.py --which bytes --out benchmarks/results/gpu_bytes.json

Measured per shape (the linears of Llama-3-8B and 70B, N out x K in features) and number of tokens M, all in one run, bfloat16
activations; each as in `gpu_gemm.py`, a CUDA graph over 200 MB of copies of the weight, the median of three turns (with 64
tokens, where power can be the limit, each after a pause):

    nvfp4   e2m1 floats, groups of 16, e4m3 scales and a factor, against int4 in groups of 32: 0.5625 bytes a weight
    mxfp4   e2m1 floats, groups of 32, e8m0 scales, against int4 in groups of 64: 0.53125 bytes
    table   any 16 numbers, groups of 64, bfloat16 scales, against the same int4
    rows    a table for each row and no groups, as a codebook is fitted: 34 bytes a row beside the codes, against int4 in groups
            that cost as much (256 of 4096 inputs, 2048 of 28672)
    groups  as `table`, but each group of a row picks one of two tables and a sign, as BitMoD's do (a byte a group more);
            `groups beside zeros`: against int4 in groups of 64 with zero points, a byte each, which reads as many bytes

and with `--which bytes` codes of eight bits and bit planes:

    e4m3, e5m2   a scale for each row, against int8 with the same
    block        e4m3 in groups of 128, as blocks of 128 x 128 are laid out, against int8 in such groups
    mxfp8        e4m3, groups of 32, e8m0 scales, against int8 in groups of 64
    rf8          any 256 numbers, a scale for each row, against int8 with the same
    plane        one bit plane in groups of 64, against integers of one bit: as many bytes
    planes3      three bit planes with an offset in groups of 128, against int3: 1.12 times the bytes
    nested       four of them in groups of 64, against int4: 1.235 times the bytes

The summary holds, for each of them, the time over that of its integers: every point's, the geometric mean and the most; and how
many times their bytes it reads. With `--compile` nothing is timed: kernels are compiled, on all cores, into the cache on disk.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aerogel.kernels.cuda import nvrtc
from aerogel.kernels.cuda.timing import in_turn
from aerogel.kernels.gemm import cuda
from aerogel.kernels.gemm.cuda import Runner
from aerogel.kernels.gemm.cuda_dense import dequantize
from aerogel.kernels.gemm.cuda_tune import random_numbers, random_planes, random_weight, weight_copies
from aerogel.kernels.gemm.cuda_weight import TileWeight

AGAINST = {
    "tables": {
        "nvfp4": ("int4 g32", 16),
        "mxfp4": ("int4 g64", 32),
        "table": ("int4 g64", 64),
        "rows": ("int4 as rows", 0),
        "groups": ("int4 g64", 64),
        "groups beside zeros": ("int4z g64", 64),
    },
    "bytes": {
        "e4m3": ("int8 g0", 0),
        "e5m2": ("int8 g0", 0),
        "block": ("int8 g128", 128),
        "mxfp8": ("int8 g64", 32),
        "rf8": ("int8 g0", 0),
        "plane": ("int1 g64", 64),
        "planes3": ("int3 g128", 128),
        "nested": ("int4 g64", 64),
    },
}
"""Name, which begins with that of the numbers -> the integers of equal bytes (z: with zero points), and the group size."""
ROW_BYTES = 34
"""A table of 16 numbers and a scale, of 16 bits each."""
PLANES = {"plane": 1, "planes3": 3, "nested": 4}
TOKENS = (1, 2, 4, 8, 16, 32, 64)
ROUNDS, WARM_TOKENS, PAUSE = 3, 64, 0.05
"""How often contenders take turns, from how many tokens on after a pause, and its seconds."""
SHAPES = ("4096x4096", "6144x4096", "28672x4096", "4096x14336", "57344x8192", "8192x28672")


def weight_of(name: str, size: int, N: int, K: int) -> TileWeight:
    """A random weight of one of the names above, on the GPU."""
    if name == "int4 as rows":
        group = min((128 << i for i in range(8) if K % (128 << i) == 0), key=lambda size: abs(2 * K / size - ROW_BYTES))
        return random_weight(N, K, 4, group, "cuda")
    if name.startswith("int"):
        width, _, own = name.removeprefix("int").partition(" g")
        zero = "integer" if width.endswith("z") else "none"
        return random_weight(N, K, int(width.removesuffix("z")), int(own), "cuda", zero=zero)
    if name in PLANES and name != "plane":
        return random_planes(N, K, PLANES[name], size, "cuda", offset=True)
    return random_numbers(N, K, name, size, "cuda")


def chosen(weight: TileWeight, M: int) -> Runner:
    """What the dispatcher runs M tokens with."""
    by = cuda.choose(weight, M, torch.bfloat16, torch.cuda.get_device_capability())
    return by.plan(weight, M, torch.bfloat16)


def compile_all(sizes: dict[str, int], asked: argparse.Namespace) -> None:
    """Every kernel of every shape into the cache on disk, side by side."""
    held = [[weight_of(name, size, *map(int, shape.split("x"))) for name, size in sizes.items()] for shape in asked.shapes]
    points = itertools.product(itertools.chain(*held), asked.tokens)
    with ThreadPoolExecutor(os.cpu_count(), initializer=torch.cuda.set_device, initargs=(0,)) as pool:
        decoded = [pool.submit(dequantize, weight, torch.bfloat16) for weight in held[0]]
        list(pool.map(chosen, *zip(*points, strict=True)))
        for one in decoded:
            one.result()


class Contender:
    """A weight and its copies, and what they should give."""

    def __init__(self, weight: TileWeight, x_of: dict[int, Tensor]) -> None:
        self.weights = weight_copies(weight)
        dense = dequantize(weight, torch.bfloat16)
        self.wanted = {M: (x @ dense.T).float() for M, x in x_of.items()}

    def at(self, x: Tensor) -> tuple[dict[str, Any], list[Callable[[], object]]]:
        """Which kernel runs, with which relative error against the decoded weight, and the calls that are timed."""
        M, weight = len(x), self.weights[0]
        y = torch.full((M, weight.N), torch.nan, device="cuda", dtype=torch.bfloat16)
        by = cuda.choose(weight, M, torch.bfloat16, torch.cuda.get_device_capability()).name
        runners = [chosen(copy, M) for copy in self.weights]
        runners[0](x, None, y)
        error = ((y.float() - self.wanted[M]).norm() / self.wanted[M].norm()).item()
        calls: list[Callable[[], object]] = [lambda run=run: run(x, None, y) for run in runners]
        read = weight.nbytes - (0 if weight.table is None else weight.table.nbytes - 2 * weight.table.numel())
        facts = {"by": by, "config": str(getattr(runners[0], "config", "")), "error": error, "bytes": read}
        return facts, calls


def rows_of(shape: str, sizes: dict[str, int], tokens: Sequence[int]) -> list[dict[str, Any]]:
    """Every weight at every number of tokens."""
    N, K = map(int, shape.split("x"))
    x_of = {M: torch.randn(M, K, device="cuda").bfloat16() for M in tokens}
    contenders = {name: Contender(weight_of(name, size, N, K), x_of) for name, size in sizes.items()}
    rows = []
    for M, x in x_of.items():
        made = {name: contender.at(x) for name, contender in contenders.items()}
        calls = {name: calls for name, (_, calls) in made.items()}
        us = in_turn(calls, rounds=ROUNDS, pause=PAUSE if M >= WARM_TOKENS else 0.0)
        rows += [{"shape": shape, "numbers": name, "M": M, "us": us[name], **facts} for name, (facts, _) in made.items()]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--which", choices=sorted(AGAINST), default="tables")
    parser.add_argument("--only", nargs="*", help="some of the names")
    parser.add_argument("--compile", action="store_true")
    asked = parser.parse_args()
    against = {name: facts for name, facts in AGAINST[asked.which].items() if not asked.only or name in asked.only}
    sizes = {plain: 0 for plain, _ in against.values()} | {name.split()[0]: size for name, (_, size) in against.items()}
    if asked.compile:
        compile_all(sizes, asked)
        return
    rows: list[dict[str, Any]] = []
    ratios: dict[str, dict[str, float]] = {name: {} for name in against}
    bytes_over: dict[str, dict[str, float]] = {name: {} for name in against}
    for shape in asked.shapes:
        rows += rows_of(shape, sizes, asked.tokens)
        found = {(row["numbers"], row["M"]): row for row in rows if row["shape"] == shape}
        for name, (plain, _) in against.items():
            for M in asked.tokens:
                one, other = found[name.split()[0], M], found[plain, M]
                ratios[name][f"{shape} M={M}"] = round(one["us"] / other["us"], 3)
                bytes_over[name][shape] = round(one["bytes"] / other["bytes"], 3)
        print(shape, {name: [ratios[name][f"{shape} M={M}"] for M in asked.tokens] for name in against}, flush=True)
    mean = {name: math.exp(sum(map(math.log, held.values())) / len(held)) for name, held in ratios.items()}
    facts = torch.cuda.get_device_properties(0)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {"gpu": facts.name, "multiprocessors": facts.multi_processor_count, "cpu": platform.processor()},
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "nvrtc": nvrtc.compiler().version},
        "summary": {
            "geometric_mean": mean,
            "most": {name: max(held.values()) for name, held in ratios.items()},
            "bytes_over": bytes_over,
            "over": ratios,
        },
        "rows": rows,
    }
    if asked.out:
        asked.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps(result["summary"]["geometric_mean"]), flush=True)  # type: ignore[index]


if __name__ == "__main__":
    main()
