"""A layer of experts in every kind of numbers, beside 4-bit integers and beside decoding: on a GPU or a CPU.

    python benchmarks/moe_numbers.py --out benchmarks/results/moe_numbers_h100.json
    python benchmarks/moe_numbers.py --device cpu --out benchmarks/results/moe_numbers_cpu.json

The layer is transformers' experts of Qwen3-30B-A3B (a quarter of its experts on a CPU, of which a token still takes 8), with
one random expert's codes for all of them: what lies in memory is as large, and time does not depend on the numbers. All kinds
take turns, each time with another routing of the tokens. `us`: median microseconds of a call; on a GPU of replays of a graph
where the kernel can be recorded, else from the host. `over_int4`: of the median of integers in this run; `bytes`: likewise.
`reference`: the same layer by the kernel that decodes an expert to float32 and multiplies, which all but integers and small
floats ran on before there were others. `error`: relative, against float32 products of the decoded weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from aerogel.kernels.cuda.timing import graph_microseconds
from aerogel.kernels.dispatch import choose_grouped
from aerogel.kernels.experts import ExpertLinear, replace_experts, stacked
from aerogel.kernels.grouped.ref import Reference
from aerogel.pack.config import choose_format
from aerogel.pack.format import Activations
from aerogel.pack.scheme import Scheme
from aerogel.quantize.formats.kmeans import KMeans
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.grids import IntGrid, quantized
from aerogel.quantize.planes import PlaneGrid

BF16 = torch.bfloat16
KINDS: dict[str, tuple[Any, Activations]] = {
    "int4": (IntGrid(bits=4, group_size=64, scale_dtype=BF16), "none"),
    "int4, groups of 72": (IntGrid(bits=4, group_size=72, scale_dtype=BF16), "none"),
    "codebooks, 4 bits": (KMeans(bits=4, rounds=2, scale_dtype=BF16), "none"),
    "codebooks, 3 bits": (KMeans(bits=3, rounds=2, scale_dtype=BF16), "none"),
    "three planes": (PlaneGrid(bits=3, group_size=64, scale_dtype=BF16), "none"),
    "nested, 4 planes": (PlaneGrid(bits=4, group_size=64, scale_dtype=BF16, offset="scale"), "none"),
    "nf4": (Nf4(scale_dtype=BF16), "none"),
    "int8": (IntGrid(bits=8), "none"),
    "int8, inputs int8": (IntGrid(bits=8), "int8"),
}
ROUTINGS, TOP = 8, 8


def experts_of(kind: str, E: int, N: int, K: int, device: str, decoding: bool) -> ExpertLinear:
    """E times the same expert, on the kernel that is chosen for it, or on the one that decodes."""
    grid, activations = KINDS[kind]
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(N)).to(device) * K**-0.5
    codes, stored = quantized(grid, weight, grid.fit(weight)), choose_format(grid, activations)
    scheme = Scheme(format=stored.name, grid=grid, activations=activations)
    layer = ExpertLinear(E, K, N, scheme, dtype=BF16, device=device)
    name, kernel = ("reference", Reference) if decoding else choose_grouped(layer.problem())
    one = kernel.base_of(layer.problem()).pack(codes, layer.problem())
    layer.adopt(stacked(lambda e: one, E), name, kernel, layer.problem())
    return layer


def module_of(kind: str, config: Any, device: str, decoding: bool = False) -> Any:
    with torch.device("meta"):
        module = Qwen3MoeExperts(config).to(BF16)
    for name, parameter in list(module.named_parameters()):
        replace_experts(module, name, experts_of(kind, *parameter.shape, device, decoding))
    return module


def weights_of(module: Any) -> list[ExpertLinear]:
    return [child for child in module.children() if isinstance(child, ExpertLinear)]


def microseconds(module: Any, x: torch.Tensor, routings: list[Any], seconds: float) -> float:
    """Of one call, the median over so many seconds; at least one round of the routings."""
    if x.is_cuda and all(weight._kernel.traceable for weight in weights_of(module)):
        return graph_microseconds([lambda r=routing: module(x, *r) for routing in routings], graph_ms=2.0, replays=5)
    taken, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken) < len(routings):
        routing = routings[len(taken) % len(routings)]
        if x.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        module(x, *routing)
        if x.is_cuda:
            torch.cuda.synchronize()
        taken.append(1e6 * (time.perf_counter() - start))
    return statistics.median(taken)


def rows_of(M: int, made: dict[str, Any], config: Any, device: str, turns: int, references: bool) -> list[dict[str, Any]]:
    """One row a kind."""
    E, x = config.num_experts, torch.randn(M, config.hidden_size, device=device).to(BF16)
    routings = [
        (torch.rand(M, E, device=device).topk(TOP).indices, torch.rand(M, TOP, device=device).softmax(-1).to(BF16))
        for _ in range(ROUTINGS)
    ]
    times: dict[str, list[float]] = {kind: [] for kind in made}
    for _ in range(turns):
        for kind, module in made.items():
            times[kind].append(microseconds(module, x, routings, 0.3))
    rows: list[dict[str, Any]] = []
    for kind, module in made.items():
        weights = weights_of(module)
        row = {"tokens": M, "kind": kind, "kernels": [weight.kernel_name for weight in weights]}
        row |= {"us": statistics.median(times[kind]), "packed_bytes": sum(weight.packed_bytes for weight in weights)}
        base = rows[0] if rows else row
        row |= {name: row[held] / base[held] for name, held in (("over_int4", "us"), ("bytes", "packed_bytes"))}
        if references:
            slow, found = module_of(kind, config, device, decoding=True), module(x, *routings[0]).float()
            wanted = slow(x, *routings[0]).float()
            row["error"] = ((found - wanted).norm() / wanted.norm()).item()
            row["reference"] = microseconds(slow, x, routings[:2], 0.0)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16])
    parser.add_argument(
        "--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), help="the first is what others are over"
    )
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--without-reference", action="store_true")
    asked = parser.parse_args()
    E = 128 if asked.device == "cuda" else 32
    config = Qwen3MoeConfig(num_experts=E, num_experts_per_tok=TOP, hidden_size=2048, moe_intermediate_size=768)
    with torch.no_grad():
        made = {kind: module_of(kind, config, asked.device) for kind in asked.kinds}
        rows = [
            row
            for M in asked.tokens
            for row in rows_of(M, made, config, asked.device, asked.turns, not asked.without_reference)
        ]
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": torch.cuda.get_device_name() if asked.device == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__},
        "experts": E,
        "rows": rows,
    }
    if asked.out:
        asked.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
