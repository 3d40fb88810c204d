"""Numbers that are no integers, on a GPU, against integers that read as many bytes.

    python benchmarks/gpu_numbers.py --out benchmarks/results/gpu_numbers.json            (about half a minute of an H100)

Measured per shape (the linears of Llama-3-8B and 70B, N out x K in features) and number of tokens M, all in one run, bfloat16
activations; each as in `gpu_gemm.py`, a CUDA graph over 200 MB of copies of the weight:

    nvfp4   e2m1 floats, groups of 16, e4m3 scales and a factor, against int4 in groups of 32: 0.5625 bytes a weight
    mxfp4   e2m1 floats, groups of 32, e8m0 scales, against int4 in groups of 64: 0.53125 bytes
    table   any 16 numbers, groups of 64, bfloat16 scales, against the same int4
    rows    a table for each row and no groups, as a codebook is fitted, against int4 in groups of 128: up to 0.5156 bytes
    groups  as `table`, but each group of a row picks one of two tables and a sign, as BitMoD's do (a byte a group more)

The summary holds, for each of them, the time over that of its integers: every point's, the geometric mean and the most.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from aerogel.kernels.cuda import nvrtc
from aerogel.kernels.cuda.timing import graph_microseconds
from aerogel.kernels.gemm import cuda
from aerogel.kernels.gemm.cuda_dense import dequantize
from aerogel.kernels.gemm.cuda_tune import random_numbers, random_weight, weight_copies
from aerogel.kernels.gemm.cuda_weight import TileWeight

AGAINST = {
    "nvfp4": ("int4 g32", 16),
    "mxfp4": ("int4 g64", 32),
    "table": ("int4 g64", 64),
    "rows": ("int4 g128", 0),
    "groups": ("int4 g64", 64),
}
"""Name -> the integers of equal bytes, and the group size."""
TOKENS = (1, 4, 16, 64)
SHAPES = ("4096x4096", "6144x4096", "28672x4096", "4096x14336", "57344x8192", "8192x28672")


def weight_of(name: str, N: int, K: int) -> TileWeight:
    """A random weight of one of the names above, on the GPU."""
    if name.startswith("int4"):
        return random_weight(N, K, 4, int(name.removeprefix("int4 g")), "cuda")
    return random_numbers(N, K, name, AGAINST[name][1], "cuda")


def microseconds(weight: TileWeight, tokens: tuple[int, ...]) -> dict[int, dict[str, Any]]:
    """Time, kernel and relative error against the decoded weight, for each number of tokens."""
    weights, dense, found = weight_copies(weight), dequantize(weight, torch.bfloat16), {}
    for M in tokens:
        x, y = torch.randn(M, weight.K, device="cuda").bfloat16(), torch.empty(M, weight.N, device="cuda", dtype=torch.bfloat16)
        chosen = cuda.choose(weight, M, torch.bfloat16, torch.cuda.get_device_capability())
        runners = [chosen.plan(copy, M, torch.bfloat16) for copy in weights]
        runners[0](x, None, y)
        wanted = (x @ dense.T).float()
        error = ((y.float() - wanted).norm() / wanted.norm()).item()
        us = graph_microseconds([lambda run=run: run(x, None, y) for run in runners])  # noqa: B023
        config = str(getattr(runners[0], "config", ""))
        found[M] = {"us": us, "by": chosen.name, "config": config, "error": error, "bytes": weight.nbytes}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    asked = parser.parse_args()
    rows, ratios = [], {name: {} for name in AGAINST}  # type: ignore[var-annotated]
    for shape in asked.shapes:
        N, K = map(int, shape.split("x"))
        names = list(dict.fromkeys([*(plain for plain, _ in AGAINST.values()), *AGAINST]))
        found = {name: microseconds(weight_of(name, N, K), tuple(asked.tokens)) for name in names}
        rows += [{"shape": shape, "numbers": name, "M": M, **row} for name in names for M, row in found[name].items()]
        for name, (plain, _) in AGAINST.items():
            for M in asked.tokens:
                ratios[name][f"{shape} M={M}"] = round(found[name][M]["us"] / found[plain][M]["us"], 3)
        print(shape, {name: [ratios[name][f"{shape} M={M}"] for M in asked.tokens] for name in AGAINST}, flush=True)
    mean = {name: math.exp(sum(map(math.log, held.values())) / len(held)) for name, held in ratios.items()}
    facts = torch.cuda.get_device_properties(0)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {"gpu": facts.name, "multiprocessors": facts.multi_processor_count, "cpu": platform.processor()},
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "nvrtc": nvrtc.compiler().version},
        "summary": {
            "geometric_mean": mean,
            "most": {name: max(held.values()) for name, held in ratios.items()},
            "over": ratios,
        },
        "rows": rows,
    }
    if asked.out:
        asked.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(json.dumps(result["summary"]["geometric_mean"]), flush=True)  # type: ignore[index]


if __name__ == "__main__":
    main()
