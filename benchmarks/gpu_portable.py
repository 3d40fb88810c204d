"""How fast the portable Triton kernels are on a GPU: against reading the weight, dense, and (on NVIDIA) our CUDA kernels.

    python benchmarks/gpu_portable.py --out benchmarks/results/gpu_portable.json            (about a minute of an H100)
    python benchmarks/gpu_portable.py --sweep --shapes 4096x4096 --tokens 1 16

Median microseconds over replays of a graph that goes round over >= 200 MB of copies of the weight; groups of 128, symmetric,
bfloat16. `floor` adds up the bytes of codes and scales in the same way (torch's sum of 64-bit words): what reading costs.
With --sweep every configuration is measured, and the best are shown beside what the rule of the kernel chooses.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton

from aerogel.kernels.cuda.timing import copies, graph_microseconds
from aerogel.kernels.gemm.cuda_tune import random_weight, weight_copies
from aerogel.kernels.gemm.cuda_weight import TileWeight
from aerogel.kernels.gemm.triton_words import Config, config_of, linear
from aerogel.pack.words import unpack_words

SHAPES = ("4096x4096", "28672x4096", "4096x14336", "8192x28672")
TOKENS = (1, 4, 16, 64, 256, 4096)


def call(weight: TileWeight, x: torch.Tensor, config: Config | None) -> torch.Tensor:
    return linear(x, weight.codes, weight.scale, None, None, None, None, weight.group_size, weight.N, config)


def candidates(M: int, N: int, K: int) -> list[Config]:
    """What a sweep measures."""
    tokens = [min(128, max(16, triton.next_power_of_2(M)))] if M <= 64 else [64, 128]
    found = []
    for rows, token, warps, stages in itertools.product((32, 64, 128), tokens, (2, 4, 8), (3, 5)):
        if rows * token // (32 * warps) > 128 or (warps == 8 and rows < 128) or (warps == 2 and rows > 64):
            continue
        for split in (1, 2, 4, 8) if M <= 64 else (1,):
            programs = -(-N // rows) * -(-M // token) * split
            if split == 1 or (programs <= 132 * 12 and K // 128 // split >= 4):
                found.append(Config(rows, token, split, warps, stages))
    return found


def compile_one(given: tuple[int, int, int, int, Config | None]) -> None:
    """Builds for one problem into Triton's cache on disk."""
    N, K, bits, M, config = given
    call(random_weight(N, K, bits, 128, "cuda"), torch.randn(M, K, device="cuda").bfloat16(), config)
    torch.cuda.synchronize()


def unique(jobs: list[tuple[int, int, int, int, Config | None]]) -> list[tuple[int, int, int, int, Config | None]]:
    """One job for each build."""
    seen = {}
    for N, K, bits, M, config in jobs:
        chosen = config or config_of(M, N, K, torch.device("cuda"))
        split = chosen.split > 1
        seen.setdefault((bits, chosen.rows, chosen.tokens, chosen.warps, chosen.stages, split), (256, 1024, bits, M, chosen))
    return list(seen.values())


def floor_microseconds(nbytes: int) -> float:
    buffers = [torch.randint(0, 255, (nbytes // 8,), device="cuda") for _ in range(copies(nbytes))]
    return graph_microseconds([lambda b=buffer: b.sum() for buffer in buffers])


def dense_microseconds(N: int, K: int, M: int) -> float:
    weights = [torch.randn(N, K, device="cuda", dtype=torch.bfloat16) for _ in range(copies(2 * N * K))]
    x = torch.randn(M, K, device="cuda").bfloat16()
    return graph_microseconds([lambda w=w: x @ w.T for w in weights])


def cuda_microseconds(weights: list[TileWeight], M: int) -> tuple[str, float]:
    from aerogel.kernels.gemm import cuda

    found = cuda.choose(weights[0], M, torch.bfloat16, torch.cuda.get_device_capability())
    runners = [found.plan(weight, M, torch.bfloat16) for weight in weights]
    x = torch.randn(M, weights[0].K, device="cuda").bfloat16()
    y = torch.empty(M, weights[0].N, device="cuda", dtype=torch.bfloat16)
    return found.name, graph_microseconds([lambda run=run: run(x, None, y) for run in runners])


def rows_of(shape: str, bits: int, tokens: list[int], sweep: bool, compare: bool) -> list[dict[str, Any]]:
    N, K = map(int, shape.split("x"))
    weights = weight_copies(random_weight(N, K, bits, 128, "cuda"))
    first = weights[0]
    scale = first.scale.transpose(1, 2).reshape(-1, first.groups)[:N].float().repeat_interleave(128, 1)[:, :K]
    dense_NK = (unpack_words(first.codes, bits, N, K).float() - (1 << (bits - 1))) * scale
    floor = floor_microseconds(first.nbytes)
    rows = []
    for M in tokens:
        x = torch.randn(M, K, device="cuda").bfloat16()
        rule = config_of(M, N, K, x.device)
        y, wanted = call(first, x, None), x.float() @ dense_NK.T
        row: dict[str, Any] = {"shape": shape, "bits": bits, "M": M, "config": str(rule), "floor": floor}
        row["error"] = ((y.float() - wanted).norm() / wanted.norm()).item()
        row["us"] = graph_microseconds([lambda w=w: call(w, x, None) for w in weights])  # noqa: B023
        if compare:
            row["dense"] = dense_microseconds(N, K, M)
            row["cuda_by"], row["cuda"] = cuda_microseconds(weights, M)
        if sweep:
            found = []
            for config in candidates(M, N, K):
                try:
                    us = graph_microseconds([lambda w=w: call(w, x, config) for w in weights], graph_ms=1.5, replays=3)  # noqa: B023
                except triton.runtime.errors.OutOfResources:
                    continue
                found.append((us, str(config)))
            row["sweep"] = sorted(found)
        print(show(row), flush=True)
        rows.append(row)
    return rows


def show(row: dict[str, Any]) -> str:
    line = f"{row['shape']} W{row['bits']} M={row['M']:<5}{row['us']:8.1f} us  floor {row['floor'] / row['us']:4.0%}"
    if "dense" in row:
        line += f"  dense/ours {row['dense'] / row['us']:.2f}  cuda/ours {row['cuda'] / row['us']:.2f} ({row['cuda_by']})"
    line += f"  err {row['error']:.1e}  {row['config']}"
    return line + "".join(f"\n      {us:8.1f} {config}" for us, config in row.get("sweep", [])[:4])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--bits", nargs="+", type=int, default=[4])
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--no-compare", dest="compare", action="store_false", help="leave out dense and CUDA kernels")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile side by side")
    asked = parser.parse_args()
    jobs: list[tuple[int, int, int, int, Config | None]] = []
    for shape, bits, M in itertools.product(asked.shapes, asked.bits, asked.tokens):
        N, K = map(int, shape.split("x"))
        jobs += [(N, K, bits, M, config) for config in [None, *(candidates(M, N, K) if asked.sweep else [])]]
    with ProcessPoolExecutor(asked.workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_or_skip, unique(jobs)))
    rows = [
        row
        for shape, bits in itertools.product(asked.shapes, asked.bits)
        for row in rows_of(shape, bits, asked.tokens, asked.sweep, asked.compare)
    ]
    facts = torch.cuda.get_device_properties(0)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {"gpu": facts.name, "multiprocessors": facts.multi_processor_count, "cpu": platform.processor()},
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "rows": rows,
    }
    if asked.out:
        asked.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


def compile_or_skip(job: tuple[int, int, int, int, Config | None]) -> None:
    try:
        compile_one(job)
    except triton.runtime.errors.OutOfResources:
        return


if __name__ == "__main__":
    main()
