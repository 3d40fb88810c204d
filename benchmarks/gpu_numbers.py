"""Numbers that are no integers, on a GPU, against integers that read as many bytes.

    python benchmarks/gpu_numbers.py --out benchmarks/results/gpu_numbers.json            (about half a minute of an H100)
    python benchmarks/gpu_numbers.py --which bytes --out benchmarks/results/gpu_bytes.json

Measured per shape (the linears of Llama-3-8B and 70B, N out x K in features) and number of tokens M, all in one run, bfloat16
activations; each as in `gpu_gemm.py`, a CUDA graph over 200 MB of copies of the weight:

    nvfp4   e2m1 floats, groups of 16, e4m3 scales and a factor, against int4 in groups of 32: 0.5625 bytes a weight
    mxfp4   e2m1 floats, groups of 32, e8m0 scales, against int4 in groups of 64: 0.53125 bytes
    table   any 16 numbers, groups of 64, bfloat16 scales, against the same int4
    rows    a table for each row and no groups, as a codebook is fitted, against int4 in groups of 128: up to 0.5156 bytes
    groups  as `table`, but each group of a row picks one of two tables and a sign, as BitMoD's do (a byte a group more)

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
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from aerogel.kernels.cuda import nvrtc
from aerogel.kernels.cuda.timing import graph_microseconds
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
        "rows": ("int4 g128", 0),
        "groups": ("int4 g64", 64),
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
"""Name -> the integers of equal bytes, and the group size."""
PLANES = {"plane": 1, "planes3": 3, "nested": 4}
TOKENS = (1, 4, 16, 64)
SHAPES = ("4096x4096", "6144x4096", "28672x4096", "4096x14336", "57344x8192", "8192x28672")


def weight_of(name: str, size: int, N: int, K: int) -> TileWeight:
    """A random weight of one of the names above, on the GPU."""
    if name.startswith("int"):
        bits, size = map(int, name.removeprefix("int").split(" g"))
        return random_weight(N, K, bits, size, "cuda")
    if name in PLANES and name != "plane":
        return random_planes(N, K, PLANES[name], size, "cuda", offset=True)
    return random_numbers(N, K, name, size, "cuda")


def chosen(weight: TileWeight, M: int) -> Runner:
    """What the dispatcher runs M tokens with."""
    by = cuda.choose(weight, M, torch.bfloat16, torch.cuda.get_device_capability())
    return by.plan(weight, M, torch.bfloat16)


def compile_all(sizes: dict[str, int], asked: argparse.Namespace) -> None:
    """Every kernel into the cache on disk."""
    for shape in asked.shapes:
        held = [weight_of(name, size, *map(int, shape.split("x"))) for name, size in sizes.items()]
        with ThreadPoolExecutor(16, initializer=torch.cuda.set_device, initargs=(0,)) as pool:
            list(pool.map(chosen, *zip(*itertools.product(held, asked.tokens), strict=True)))
            if shape == asked.shapes[0]:
                list(pool.map(dequantize, held, itertools.repeat(torch.bfloat16)))


def microseconds(weight: TileWeight, tokens: tuple[int, ...]) -> dict[int, dict[str, Any]]:
    """Time, kernel and relative error against the decoded weight, for each number of tokens."""
    weights, dense, found = weight_copies(weight), dequantize(weight, torch.bfloat16), {}
    for M in tokens:
        x, y = torch.randn(M, weight.K, device="cuda").bfloat16(), torch.empty(M, weight.N, device="cuda", dtype=torch.bfloat16)
        by = cuda.choose(weight, M, torch.bfloat16, torch.cuda.get_device_capability()).name
        runners = [chosen(copy, M) for copy in weights]
        runners[0](x, None, y)
        wanted = (x @ dense.T).float()
        error = ((y.float() - wanted).norm() / wanted.norm()).item()
        us = graph_microseconds([lambda run=run: run(x, None, y) for run in runners])  # noqa: B023
        config = str(getattr(runners[0], "config", ""))
        found[M] = {"us": us, "by": by, "config": config, "error": error, "bytes": weight.nbytes}
    return found


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
    sizes = {plain: 0 for plain, _ in against.values()} | {name: size for name, (_, size) in against.items()}
    if asked.compile:
        compile_all(sizes, asked)
        return
    rows, ratios, bytes_over = [], {name: {} for name in against}, {}  # type: ignore[var-annotated]
    for shape in asked.shapes:
        N, K = map(int, shape.split("x"))
        found = {name: microseconds(weight_of(name, size, N, K), tuple(asked.tokens)) for name, size in sizes.items()}
        rows += [{"shape": shape, "numbers": name, "M": M, **row} for name in sizes for M, row in found[name].items()]
        for name, (plain, _) in against.items():
            for M in asked.tokens:
                ratios[name][f"{shape} M={M}"] = round(found[name][M]["us"] / found[plain][M]["us"], 3)
                bytes_over[name] = round(found[name][M]["bytes"] / found[plain][M]["bytes"], 3)
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
