"""Every CUDA kernel at small ragged shapes, to be run under compute-sanitizer: `make gpu-sanitize`.

Buffers come from the driver one by one (PYTORCH_NO_CUDA_MEMORY_CACHING), so that a byte beyond one of them is an error, and
results are compared with a dense product, so that nothing passes by not running.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from aerogel.kernels.gemm import cuda, cuda_int8
from aerogel.kernels.gemm.cuda_dense import dequantize
from aerogel.kernels.gemm.cuda_few import Config as FewConfig
from aerogel.kernels.gemm.cuda_few import Plan as FewPlan
from aerogel.kernels.gemm.cuda_made import Gated, Normed
from aerogel.kernels.gemm.cuda_quantize import E4M3, INT8, ROUNDED, Quantizer
from aerogel.kernels.gemm.cuda_tune import random_numbers, random_planes, random_weight
from aerogel.kernels.gemm.cuda_weight import TileWeight
from aerogel.kernels.gemm.cuda_wgmma import Config, deepest
from aerogel.kernels.gemm.cuda_wgmma_plan import Plan
from aerogel.kernels.grouped.cuda_grouped import cuts
from aerogel.kernels.grouped.cuda_routes import add_experts, most_runs, route_experts, spread_tokens

N, K = 200, 712
KINDS = ((128, "none"), (32, "integer"), (0, "float"))
TOKENS = (1, 5, 16, 33)
FEW = (
    FewConfig(ring=False, row_tiles=2, k_warps=4),
    FewConfig(ring=True, row_tiles=2, k_warps=4, stages=3),
    FewConfig(ring=True, row_tiles=1, k_warps=2, stages=2, x_resident=True, cluster=2),
)
MANY = (
    Config(tokens=32, x_stages=4, w_stages=2),
    Config(tokens=32, blocks=2, split=3, x_stages=4, w_stages=2),
    Config(tokens=64, share=2, split=2, x_stages=4, w_stages=2, batch=8),
    Config(tokens=48, resident=2, batch=2, x_stages=3, w_stages=2),
)
Case = tuple[str, cuda.Runner, int]


def cases(weight: TileWeight, every_cut: bool) -> Iterator[Case]:
    """(what it is, the run, tokens) of each implementation that takes the weight; every cut of them where asked."""
    dtype, capability = torch.bfloat16, torch.cuda.get_device_capability()
    for M in TOKENS:
        for found in cuda.implementations():
            if found.refuses(weight, M, dtype, capability) is None:
                yield f"{found.name} M={M}", found.plan(weight, M, dtype), M
    hopper = capability[0] == 9
    for few in FEW if every_cut else ():
        if not few.ring or hopper:
            for M in (3, 16):
                yield f"{few}", FewPlan(weight, few, M, dtype), M
    for many in MANY if every_cut and hopper else ():
        config = deepest(weight, many)
        if config is not None:
            yield f"{config}", Plan(weight, config, 70, dtype), 70


def weights(asked: list[str]) -> Iterator[tuple[str, TileWeight, bool]]:
    """(what it is, a weight, whether every cut runs it): integers of the widths asked for, `numbers` and `planes`; all without
    any."""
    widths = [int(word) for word in asked if word.isdigit()] or (list(range(1, 9)) if not asked else [])
    for bits, (group, zero) in itertools.product(widths, KINDS):
        what = f"{bits} bits, groups of {group}, zero {zero}"
        yield what, random_weight(N, K, bits, group, "cuda", zero=zero), bits in (3, 4, 8)
    if "numbers" in asked or not asked:
        yield from numbers()
    if "planes" in asked or not asked:
        yield from planes()


def numbers() -> Iterator[tuple[str, TileWeight, bool]]:
    """Tables and floats."""
    for name, group in (("nvfp4", 16), ("mxfp4", 32), ("table", 64), ("rows", 0), ("groups", 32), ("rf8", 0)):
        yield name, random_numbers(N, K, name, group, "cuda"), True
    for bits, mantissa in ((5, 2), (6, 2), (6, 3), (8, 2), (8, 3)):  # any bits are numbers to the kernels
        plain = random_weight(N, K, bits, 32, "cuda")
        yield f"floats, {mantissa} of {bits} bits mantissa", replace(plain, floats=mantissa), False


def planes() -> Iterator[tuple[str, TileWeight, bool]]:
    """Bit planes, of rows and of blocks, and one plane as signs."""
    for bits, group in ((1, 64), (2, 16), (3, 128), (4, 64), (4, 48)):
        yield f"{bits} planes, groups of {group}", random_planes(N, K, bits, group, "cuda", offset=True), bits > 2
    for group in (16, 64):
        yield f"signs, groups of {group}", random_numbers(N, K, "plane", group, "cuda"), False
    yield "3 planes in blocks", random_planes(N, K, 3, 16, "cuda", blocks=True), True


def main() -> int:
    """0 when every result is right."""
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") != "1":
        raise SystemExit("set PYTORCH_NO_CUDA_MEMORY_CACHING=1: buffers must end where they end")
    wrong = count = 0
    for what, weight, every_cut in weights(sys.argv[1:]):
        reference = dequantize(weight, torch.bfloat16)
        for name, run, M in cases(weight, every_cut):
            x = torch.randn(M, K, device="cuda").bfloat16()
            y = torch.full((M, N), torch.nan, device="cuda", dtype=torch.bfloat16)
            run(x, None, y)
            wanted = (x @ reference.T).float()
            error = float((y.float() - wanted).norm() / wanted.norm())
            count += 1
            if not error < 1e-2:
                wrong += 1
                print(f"{what}: {name} is off by {error:.2g}", flush=True)
    wrong += rounded() + grouped()
    print(f"{count} matmuls, {wrong} wrong", flush=True)
    return int(wrong > 0)


def rounded() -> int:
    """Activations of 8 bits, as they are and where they are made: how many results are wrong."""
    x, both, wrong = torch.randn(70, K, device="cuda").bfloat16(), torch.randn(70, 2 * K, device="cuda").bfloat16(), 0
    factor = torch.rand(K, device="cuda")
    made = [
        x,
        Normed(x, factor, 1e-5, False),
        Normed(x, factor.bfloat16(), 1e-5, True),
        Gated(both[:, :K], both[:, K:], "silu"),
    ]
    for output, what in itertools.product((INT8, E4M3, ROUNDED), made):
        codes, scale = Quantizer(dtype=x.dtype, device=x.device, output=output, columns=-(-K // 16) * 16)(what)
        back = codes.float()[:, :K] * (1 if output == ROUNDED else scale[:, None])
        y = (what if isinstance(what, torch.Tensor) else what.settled()).float()
        wrong += not float((back - y).norm() / y.norm()) < 5e-2
    for bits, group in ((4, 128), (8, 0)):
        weight = random_weight(N, K, bits, group, "cuda")
        r, y = cuda_int8.row_scale(weight), torch.full((70, N), torch.nan, device="cuda", dtype=torch.bfloat16)
        config = cuda_int8.cut(weight, 128, 1, 1, 2)
        run = cuda_int8.many_tokens(weight, r, 70, torch.bfloat16, config)
        if run is not None:
            run(x, None, y)
            wanted = (x @ dequantize(weight, torch.bfloat16).T).float()
            wrong += not float((y.float() - wanted).norm() / wanted.norm()) < 3e-2
    return wrong


def grouped() -> int:
    """Experts of ragged loads on Hopper: how many results are wrong."""
    if torch.cuda.get_device_capability()[0] != 9:
        return 0
    experts, wrong = 5, 0
    weight = random_weight(experts * 208, K, 4, 128, "cuda")
    dense = dequantize(weight, torch.bfloat16).reshape(experts, 208, K)[:, :N].float()
    for run, pairs in ((16, 3), (32, 70), (160, 400)):
        expert = torch.randint(experts + 1, (pairs, 2), device="cuda")
        order, place, runs = route_experts(expert.reshape(-1), experts, run)
        x, share = torch.randn(pairs, K, device="cuda").bfloat16(), torch.rand(pairs, 2, device="cuda")
        rows = spread_tokens(x, order)
        for split in (1, 3):
            config = cuts(weight, run, split)[0]
            y = torch.full((2 * pairs, N), torch.nan, device="cuda", dtype=torch.bfloat16)
            plan = Plan(replace(weight, N=N), config, 2 * pairs, torch.bfloat16, runs=most_runs(2 * pairs, experts, run))
            plan.launch(rows, None, None, y, runs=runs)
            there = (expert < experts)[..., None]
            each = torch.einsum("mk,mjnk->mjn", x.float(), dense[expert.clamp(max=experts - 1)])
            wanted = (torch.where(there, each, 0) * share[..., None]).sum(1)
            wrong += not float((add_experts(y, place, share).float() - wanted).norm() / wanted.norm()) < 1e-2
    return wrong


if __name__ == "__main__":
    sys.exit(main())
