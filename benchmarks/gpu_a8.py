"""8-bit activations on a GPU, their rounding included, beside a dense matmul and torch's own 8-bit products.

    python benchmarks/gpu_a8.py --out benchmarks/results/gpu_a8.json            (about a minute of an H100)

Microseconds, medians over replays of a CUDA graph that goes round over copies of the weight (200 MB and more), and over three
rounds in which all of these take turns; M tokens:

    dense     torch's bfloat16 matmul
    w4a8      4 bits in groups of 128, two-step integers, our matmul behind our quantizer
    w8a8      8 bits per channel, the same kernels
    fp8       e4m3 per channel: our quantizer, then torch._scaled_mm
    int_mm    torch._int_mm alone, without rounding x and without scales
    scaled_mm torch._scaled_mm alone, without rounding x

and, as a model has it, with what makes x: the norm before attention or an MLP (K of 4096, 8192), the gate behind its activation
(14336, 28672).

    made                 that kernel alone, 16 bits out
    dense_made           that kernel, then torch's matmul
    w4a8_made, w8a8_made, fp8_made   the same with the rounding inside, 8 bits out, then the matmul

`--sweep` times every cut of the integer matmul instead, its quantizer left out, beside the 16-bit one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from aerogel.kernels.cuda import sources
from aerogel.kernels.cuda.timing import copies, graph_microseconds, in_turn
from aerogel.kernels.gemm import cuda_fp8, cuda_int8
from aerogel.kernels.gemm.cuda_made import Gated, Made, Normed
from aerogel.kernels.gemm.cuda_quantize import INT8, ROUNDED, Quantizer
from aerogel.kernels.gemm.cuda_tune import random_weight, weight_copies
from aerogel.kernels.gemm.cuda_wgmma import defines

SHAPES = ("4096x4096", "6144x4096", "28672x4096", "4096x14336", "57344x8192", "8192x28672")
TOKENS = (16, 64, 128, 256, 512, 1024, 2048, 4096)


ROUNDS = 3
PAUSE = 0.03
"""Seconds between measurements. A dense product draws all the power there is, and what is measured right behind it pays."""


def row(shape: str, M: int, held: dict[str, Any]) -> dict[str, Any]:
    N, K = map(int, shape.split("x"))
    x, y = torch.randn(M, K, device="cuda").bfloat16(), torch.empty(M, N, device="cuda", dtype=torch.bfloat16)
    x8, xf = torch.randint(-127, 128, (M, K), device="cuda", dtype=torch.int8), x.to(torch.float8_e4m3fn)
    one, scale = torch.ones(M, 1, device="cuda"), held["scale"]

    def packed(name: str) -> list[Callable[[], Any]]:
        multiply = cuda_int8.tiles_linear_int8
        return [lambda w=w, r=r: multiply(x, w.codes, w.scale, None, r, None, w.group_size, N) for w, r in held[name]]

    calls: dict[str, list[Callable[[], Any]]] = {
        "dense": [lambda w=w: torch.mm(x, w.T, out=y) for w in held["dense"]],
        "w4a8": packed("w4a8"),
        "w8a8": packed("w8a8"),
        "fp8": [lambda w=w: cuda_fp8.fp8_linear(x, w, scale, None) for w in held["e4m3"]],
        "scaled_mm": [
            lambda w=w: torch._scaled_mm(xf, w.T, scale_a=one, scale_b=scale[None], out_dtype=torch.bfloat16)
            for w in held["e4m3"]
        ],
    }
    made, make = made_for(shape, M)
    calls["made"] = [make] * 4
    calls["dense_made"] = [lambda w=w: torch.mm(make(), w.T, out=y) for w in held["dense"]]
    for name in ("w4a8", "w8a8"):
        calls[f"{name}_made"] = [
            lambda w=w, r=r: cuda_int8.tiles_linear_int8(made, w.codes, w.scale, None, r, None, w.group_size, N)
            for w, r in held[name]
        ]
    calls["fp8_made"] = [lambda w=w: cuda_fp8.fp8_linear(made, w, scale, None) for w in held["e4m3"]]
    if M > 16:
        calls["int_mm"] = [lambda w=w: torch._int_mm(x8, w.T) for w in held["int8"]]
    found = in_turn(calls, rounds=ROUNDS, pause=PAUSE)
    over = {name: found["dense"] / found[name] for name in ("w4a8", "w8a8", "fp8")}
    over |= {f"{name}_made": found["dense_made"] / found[f"{name}_made"] for name in ("w4a8", "w8a8", "fp8")}
    print(f"{shape} M={M:<5}" + " ".join(f"{name} {us:8.1f}" for name, us in found.items()) + "  dense over "
          + " ".join(f"{name} {ratio:.2f}" for name, ratio in over.items()), flush=True)  # fmt: skip
    best = {"best_over_dense": max(over[name] for name in ("w4a8", "w8a8", "fp8"))}
    return {"shape": shape, "M": M, **found, **best, "made_over_dense": max(over["w4a8_made"], over["w8a8_made"])}


def made_for(shape: str, M: int) -> tuple[Made, Callable[[], torch.Tensor]]:
    """What makes the input of such a linear in a model, and the kernel that does so in 16 bits."""
    K = int(shape.split("x")[1])
    if K > 8192:
        both = torch.randn(M, 2 * K, device="cuda").bfloat16()
        g, u = both[:, :K], both[:, K:]
        return Gated(g, u, "silu"), lambda: torch.ops.aerogel.gate(g, u, "silu")
    x, weight = torch.randn(M, K, device="cuda").bfloat16(), torch.rand(K, device="cuda").bfloat16()
    return Normed(x, weight, 1e-5, True), lambda: torch.ops.aerogel.rms_norm(x, weight, 1e-5, True)


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
    """Each cut of the integer matmul, without the quantizer; beside it the 16-bit matmul, and what each rounding costs."""
    rows = []
    for shape, (bits, group) in itertools.product(shapes, ((4, 128), (8, 0))):
        N, K = map(int, shape.split("x"))
        held = [(w, cuda_int8.row_scale(w)) for w in weight_copies(random_weight(N, K, bits, group, "cuda"))]
        configs = [c for numbers in cuda_int8.CUTS if (c := cuda_int8.cut(held[0][0], *numbers)) is not None]
        macros = [defines(held[0][0], c, torch.bfloat16) | {"INT8": 1} for c in configs]
        sources.compile_ahead([("wgmma.cu", m) for m in macros], torch.cuda.get_device_capability(), workers=16)
        for M in tokens:
            rows += sweep_row(shape, bits, held, configs, M)
    return rows


def sweep_row(shape: str, bits: int, held: list[Any], configs: list[Any], M: int) -> list[dict[str, Any]]:
    from aerogel.kernels.gemm import cuda
    from aerogel.kernels.gemm.cuda_wgmma_plan import Plan

    (N, K), (weight, _) = map(int, shape.split("x")), held[0]
    x, y = torch.randn(M, K, device="cuda").bfloat16(), torch.empty(M, N, device="cuda", dtype=torch.bfloat16)
    how: dict[str, Any] = {"dtype": x.dtype, "device": x.device, "columns": K}
    quantizers = [Quantizer(output=INT8, permuted=True, **how), Quantizer(output=ROUNDED, **how)]
    rounding, rounding16 = (graph_microseconds([lambda q=q: q(x)] * 4) for q in quantizers)
    codes, scale = quantizers[0](x)
    runners = [cuda.choose(w, M, x.dtype, (9, 0)).plan(w, M, x.dtype) for w, _ in held]
    sixteen = graph_microseconds([lambda r=r: r(x, None, y) for r in runners])
    facts = {"shape": shape, "bits": bits, "M": M, "sixteen": sixteen, "rounding": rounding, "rounding16": rounding16}
    print(f"{shape} W{bits} M={M}: 16 bits {sixteen:.1f} us + {rounding16:.1f}, rounding to bytes {rounding:.1f}", flush=True)
    rows = []
    for config in configs:
        if config.tokens >= 2 * M:
            continue
        plans = [Plan(w, config, M, torch.bfloat16, row_scale=r) for w, r in held]
        us = graph_microseconds([lambda p=p: p.launch(codes, scale, None, y) for p in plans])
        guess = cuda_int8.microseconds(weight, config, M, 132)
        rows.append(facts | {"us": us, "guess": guess, "config": str(config)})
        print(f"    tokens {config.tokens} blocks {config.blocks} share {config.share} batch {config.batch} stages"
              f" {config.x_stages}/{config.w_stages}: {us:.1f} us (guess {guess:.0f}) {2 * M * N * K / us / 1e6:.0f} TOP/s",
              flush=True)  # fmt: skip
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
