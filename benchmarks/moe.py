"""A layer of experts on a GPU: packed to 4 bits beside transformers' own dense ways, at the shapes of two known models.

    python benchmarks/moe.py --out benchmarks/results/moe.json            (about a minute of an H100)

The layer is transformers' module of experts with random weights; the packed one holds the same weights rounded to 4 bits in
groups of 128, the dense ones what those decode to, bfloat16. Each number is the median over replays of a graph in which
calls with 16 different random routings follow one another, so that small batches do not find their experts in the cache.
`grouped_mm`, `batched_mm`: transformers' implementations (the latter copies the chosen weights, so only for few tokens).
`read_GBps`: packed bytes of the experts that were chosen, over our time. `error`: relative, against the dense layer.
`parts`: microseconds of the operators of our layer, each timed alone. `--sweep` times every length of runs and every cut of
both products beside what the rule chose.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from aerogel.kernels.cuda import sources
from aerogel.kernels.cuda.timing import graph_microseconds
from aerogel.kernels.experts import ExpertLinear, gate, replace_experts
from aerogel.kernels.gemm import cuda
from aerogel.kernels.gemm.cuda_wgmma import SOURCE, defines
from aerogel.kernels.gemm.cuda_wgmma_plan import Plan
from aerogel.kernels.grouped import cuda_grouped
from aerogel.kernels.grouped.cuda_routes import RUNS, most_runs, route_experts, run_tokens
from aerogel.pack.scheme import Scheme
from aerogel.quantize.grids import IntGrid

GRID = IntGrid(bits=4, group_size=128, scale_dtype=torch.bfloat16)
LAYERS: dict[str, tuple[Any, Any, int, int]] = {
    "Qwen3-30B-A3B": (
        Qwen3MoeExperts,
        Qwen3MoeConfig(num_experts=128, num_experts_per_tok=8, hidden_size=2048, moe_intermediate_size=768),
        128,
        8,
    ),
    "Mixtral-8x7B": (
        MixtralExperts,
        MixtralConfig(num_local_experts=8, num_experts_per_tok=2, hidden_size=4096, intermediate_size=14336),
        8,
        2,
    ),
}
ROUTINGS = 16


def random_experts(E: int, N: int, K: int) -> ExpertLinear:
    """Random codes, scales of about the size of a trained model's."""
    layer = ExpertLinear(E, K, N, Scheme(format="pack-quantized", grid=GRID), dtype=torch.bfloat16, device="cuda")
    layer.weight_packed.random_()
    layer.weight_scale.copy_((0.5 + torch.rand(E, N, K // 128, device="cuda")) * 0.02 * K**-0.5 * 8)
    layer.weight_shape.copy_(torch.tensor([N, K]))
    return layer.prepare()


def build(cls: Any, config: Any, E: int) -> tuple[Any, Any]:
    """The packed module and the dense one with the same weights."""
    with torch.device("meta"):
        packed, dense = cls(config).bfloat16(), cls(config).bfloat16()
    for name, parameter in list(dense.named_parameters()):
        weight = random_experts(E, parameter.shape[1], parameter.shape[2])
        dense.register_parameter(name, torch.nn.Parameter(weight.dequantize(torch.bfloat16), requires_grad=False))
        replace_experts(packed, name, weight)
    return packed, dense


def micros(module: Any, x: torch.Tensor, routings: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    calls: list[Callable[[], object]] = [lambda r=routing: module(x, *r) for routing in routings]
    return graph_microseconds(calls, graph_ms=3.0, replays=5)


def rows_of(name: str, tokens: list[int], sweep: bool) -> list[dict[str, Any]]:
    cls, config, E, k = LAYERS[name]
    packed, dense = build(cls, config, E)
    weights = [child for child in packed.children() if isinstance(child, ExpertLinear)]
    rows = []
    for M in tokens:
        x = torch.randn(M, config.hidden_size, device="cuda").bfloat16()
        routings = []
        for _ in range(ROUTINGS if M < 512 else 4):
            index = torch.rand(M, E, device="cuda").topk(k).indices
            weight = torch.rand(M, k, device="cuda").softmax(-1).bfloat16()
            routings.append((index, weight))
        chosen = sum(len(index.unique()) for index, _ in routings) / len(routings)
        config._experts_implementation = "grouped_mm"
        wanted, found = dense(x, *routings[0]).float(), packed(x, *routings[0]).float()
        row: dict[str, Any] = {"layer": name, "tokens": M, "experts": E, "k": k, "chosen": chosen}
        row["error"] = ((found - wanted).norm() / wanted.norm()).item()
        row["us"] = micros(packed, x, routings)
        row["read_GBps"] = sum(weight.packed_bytes for weight in weights) / E * chosen / row["us"] / 1e3
        for way in ("grouped_mm", "batched_mm") if M <= 16 else ("grouped_mm",):
            config._experts_implementation = way
            row[way] = micros(dense, x, routings)
        row["parts"] = parts(packed, x, routings)
        if sweep:
            row["sweep"] = swept(weights, x, routings)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def parts(module: Any, x: torch.Tensor, routings: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """Microseconds of each operator of the layer."""
    up, down = module.gate_up_proj, module.down_proj
    held = []
    for index, weight in routings:
        expert = index.reshape(-1)
        routes = up.routes(expert)
        rows = up.spread(x, routes)
        u = up(rows, expert, routes)
        h = gate(module, u)
        held.append((expert, routes, rows, u, h, down(h, expert, routes), weight))
    steps: dict[str, Callable[..., object]] = {
        "route": lambda expert, *_: up.routes(expert),
        "spread": lambda expert, routes, *_: up.spread(x, routes),
        "up": lambda expert, routes, rows, *_: up(rows, expert, routes),
        "gate": lambda expert, routes, rows, u, *_: gate(module, u),
        "down": lambda expert, routes, rows, u, h, *_: down(h, expert, routes),
        "add": lambda expert, routes, rows, u, h, y, weight: down.add(y, weight, routes),
    }
    return {
        name: graph_microseconds([lambda s=step, h=each: s(*h) for each in held], graph_ms=2.0, replays=5)
        for name, step in steps.items()
    }


def swept(weights: list[ExpertLinear], x: torch.Tensor, routings: Any) -> list[dict[str, Any]]:
    """Each product alone, for lengths of runs around the rule's and each cut."""
    found = []
    pairs, experts = routings[0][0].numel(), weights[0].experts
    near = RUNS.index(run_tokens(pairs, experts))
    for layer in weights:
        weight = cuda_grouped.below_each_other(cuda.tile_weight(layer._tensors(), layer.problem()))
        rows = torch.randn(pairs, layer.in_features, device="cuda").bfloat16()
        y = torch.empty(pairs, layer.out_features, device="cuda", dtype=torch.bfloat16)
        jobs = [
            (run, c)
            for run in RUNS[max(0, near - 1) : near + 2]
            for split in (cuda_grouped.SPLITS if pairs < 32 else (1,))
            for c in cuda_grouped.cuts(weight, run, split)
        ]
        macros = [defines(weight, config, torch.bfloat16) | {"INT8": 0, "EXPERTS": 1} for _, config in jobs]
        sources.compile_ahead([(SOURCE, macro) for macro in macros], torch.cuda.get_device_capability(), workers=16)
        for run, config in jobs:
            plan = Plan(weight, config, pairs, torch.bfloat16, runs=most_runs(pairs, experts, run))
            runs = [route_experts(index.reshape(-1), experts, run)[2] for index, _ in routings]
            calls = [functools.partial(plan.launch, rows, None, None, y, runs=each) for each in runs]
            us = graph_microseconds(calls, graph_ms=1.0, replays=3)
            found.append({"N": layer.out_features, "run": run, "us": us, "config": str(config)})
    return sorted(found, key=lambda entry: (entry["N"], entry["us"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", nargs="+", default=list(LAYERS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64, 512, 2048])
    parser.add_argument("--sweep", action="store_true")
    asked = parser.parse_args()
    with torch.no_grad():
        rows = [row for name in asked.layers for row in rows_of(name, asked.tokens, asked.sweep)]
    facts = torch.cuda.get_device_properties(0)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {"gpu": facts.name, "cpu": platform.processor()},
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__},
        "rows": rows,
    }
    if asked.out:
        asked.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
