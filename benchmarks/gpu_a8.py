"""8-bit activations on a GPU, their rounding included, beside a dense matmul and torch's own 8-bit products.

    python benchmarks/gpu_a8.py --out benchmarks/results/gpu_a8.json            (about a minute of an H100)

Microseconds, medians over replays of a CUDA graph that goes round over copies of the weight (200 MB and more), M tokens:

    dense     torch's bfloat16 matmul
    w4a8      4 bits in groups of 128, two-step integers, our matmul behind our quantizer
    w8a8      8 bits per channel, the same kernels
    fp8       e4m3 per channel: our quantizer, then torch._scaled_mm
    int_mm    torch._int_mm alone, without rounding x and without scales
    scaled_mm torch._scaled_mm alone, without rounding x

`--sweep` times every cut of the integer matmul instead, its quantizer left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from aerogel.kernels.cuda import sources
from aerogel.kernels.cuda.timing import copies, graph_microseconds
from aerogel.kernels.gemm import cuda_fp8, cuda_int8
from aerogel.kernels.gemm.cuda_quantize import INT8, Quantizer
from aerogel.kernels.gemm.cuda_tune import random_weight, weight_copies
from aerogel.kernels.gemm.cuda_wgmma import defines

SHAPES = ("4096x4096", "6144x4096", "28672x4096", "4096x14336", "57344x8192", "8192x28672")
TOKENS = (16, 64, 128, 256, 512, 1024, 2048, 4096)


def rotate(calls: list[Callable[[], Any]]) -> float:
    return graph_microseconds(calls)


def row(shape: str, M: int, held: dict[str, Any]) -> dict[str, Any]:
    N, K = map(int, shape.split("x"))
    x, y = torch.randn(M, K, device="cuda").bfloat16(), torch.empty(M, N, device="cuda", dtype=torch.bfloat16)
    found: dict[str, Any] = {"shape": shape, "M": M}
    found["dense"] = rotate([lambda w=w: torch.mm(x, w.T, out=y) for w in held["dense"]])
    for name in ("w4a8", "w8a8"):
        calls = [
            lambda w=w, r=r: cuda_int8.tiles_linear_int8(x, w.codes, w.scale, None, r, None, w.group_size, N)
            for w, r in held[name]
        ]
        found[name] = rotate(calls)
    found["fp8"] = rotate([lambda w=w: cuda_fp8.fp8_linear(x, w, held["scale"], None) for w in held["e4m3"]])
    if M > 16:
        x8 = torch.randint(-127, 128, (M, K), device="cuda", dtype=torch.int8)
        found["int_mm"] = rotate([lambda w=w: torch._int_mm(x8, w.T) for w in held["int8"]])
    xf, one = x.to(torch.float8_e4m3fn), torch.ones(M, 1, device="cuda")
    found["scaled_mm"] = rotate(
        [
            lambda w=w: torch._scaled_mm(xf, w.T, scale_a=one, scale_b=held["scale"][None], out_dtype=torch.bfloat16)
            for w in held["e4m3"]
        ]
    )
    best = min(found[name] for name in ("w4a8", "w8a8", "fp8"))
    print(f"{shape} M={M:<5}" + " ".join(f"{k} {v:8.1f}" for k, v in found.items() if k not in ("shape", "M"))
          + f"  dense/w4a8 {found['dense'] / found['w4a8']:.2f} /w8a8 {found['dense'] / found['w8a8']:.2f}"
          f" /fp8 {found['dense'] / found['fp8']:.2f}", flush=True)  # fmt: skip
    return found | {"best_over_dense": found["dense"] / best}


def weights(shape: str) -> dict[str, Any]:
    N, K = map(int, shape.split("x"))
    four = weight_copies(random_weight(N, K, 4, 128, "cuda"))
    eight = weight_copies(random_weight(N, K, 8, 0, "cuda"))
    return {
        "dense": [torch.randn(N, K, device="cuda", dtype=torch.bfloat16) for _ in range(copies(2 * N * K))],
        "w4a8": [(w, cuda_int8.row_scale(w)) for w in four],
        "w8a8": [(w, cuda_int8.row_scale(w)) for w in eight],
        "e4m3": [torch.randn(N, K, device="cuda").to(torch.float8_e4m3fn) for _ in range(copies(N * K))],
        "int8": [torch.randint(-127, 128, (N, K), device="cuda", dtype=torch.int8) for _ in range(copies(N * K))],
        "scale": torch.rand(N, device="cuda") / 100,
    }


def sweep(shapes: list[str], tokens: list[int]) -> list[dict[str, Any]]:
    """Each cut of the integer matmul for 4 bits in groups of 128, without the quantizer."""
    from aerogel.kernels.gemm.cuda_wgmma_plan import Plan

    rows = []
    for shape in shapes:
        N, K = map(int, shape.split("x"))
        held = [(w, cuda_int8.row_scale(w)) for w in weight_copies(random_weight(N, K, 4, 128, "cuda"))]
        configs = [cuda_int8.cut(held[0][0], *numbers) for numbers in cuda_int8.CUTS]
        macros = [defines(held[0][0], c, torch.bfloat16) | {"INT8": 1} for c in configs if c is not None]
        sources.compile_ahead([("wgmma.cu", m) for m in macros], torch.cuda.get_device_capability(), workers=16)
        for M in tokens:
            x = torch.randn(M, K, device="cuda").bfloat16()
            y = torch.empty(M, N, device="cuda", dtype=torch.bfloat16)
            codes, scale = Quantizer(dtype=x.dtype, device=x.device, output=INT8, columns=K, permuted=True)(x)
            rounding = graph_microseconds(
                [lambda: Quantizer(dtype=x.dtype, device=x.device, output=INT8, columns=K, permuted=True)(x)] * 4  # noqa: B023
            )
            for config in configs:
                if config is None or config.tokens >= 2 * M:
                    continue
                plans = [Plan(w, config, M, torch.bfloat16, row_scale=r) for w, r in held]
                us = graph_microseconds([lambda p=p: p.launch(codes, scale, None, y) for p in plans])  # noqa: B023
                guess = cuda_int8.microseconds(held[0][0], config, M, 132)
                rows.append({"shape": shape, "M": M, "us": us, "guess": guess, "rounding": rounding, "config": str(config)})
                print(f"{shape} M={M} tokens {config.tokens} blocks {config.blocks} share {config.share} batch {config.batch}"
                      f" stages {config.x_stages}/{config.w_stages}: {us:.1f} us (guess {guess:.0f}, rounding {rounding:.1f})"
                      f" {2 * M * N * K / us / 1e6:.0f} TOP/s", flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--sweep", action="store_true")
    asked = parser.parse_args()
    if asked.sweep:
        rows = sweep(asked.shapes, asked.tokens)
    else:
        rows = []
        for shape in asked.shapes:
            held = weights(shape)
            rows += [row(shape, M, held) for M in asked.tokens]
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {"gpu": torch.cuda.get_device_name(), "cpu": platform.processor()},
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
        "rows": rows,
    }
    if asked.out:
        asked.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
