"""A layer of experts on a GPU: packed to 4 bits beside transformers' own dense ways, at the shapes of two known models.

    python benchmarks/moe.py --out benchmarks/results/moe.json            (about half a minute of an H100)

The layer is transformers' module of experts with random weights; the packed one holds the same weights rounded to 4 bits in
groups of 128, the dense ones what those decode to, bfloat16. Each number is the median over replays of a graph in which
calls with 16 different random routings follow one another, so that small batches do not find their experts in the cache.
`grouped_mm`, `batched_mm`: transformers' implementations (the latter copies the chosen weights, so only for few tokens).
`read_GBps`: packed bytes of the experts that were chosen, over our time. `error`: relative, against the dense layer.
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
import transformers
import triton
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from aerogel.kernels.cuda.timing import graph_microseconds
from aerogel.kernels.experts import ExpertLinear, replace_experts
from aerogel.kernels.gemm.triton_words import Config
from aerogel.kernels.grouped import triton_grouped
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
        if sweep:
            row["sweep"] = swept(packed, x, routings)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def swept(packed: Any, x: torch.Tensor, routings: Any) -> list[tuple[float, str]]:
    """Other blocks than the rule's."""
    rule, few, found = triton_grouped.config_of, triton_grouped.FEW_PAIRS, []
    for limit in {few, 0, 1 << 30} if len(x) <= 16 else {few}:
        triton_grouped.FEW_PAIRS = limit
        for rows, warps, stages in ((32, 2, 4), (64, 4, 4), (128, 4, 4)):
            triton_grouped.config_of = lambda pairs, experts, by, c=(rows, warps, stages): Config(
                c[0], triton_grouped.block_tokens(pairs, experts) if by else 16, 1, c[1], c[2]
            )
            found.append((micros(packed, x, routings), f"FEW_PAIRS={limit} rows={rows} warps={warps} stages={stages}"))
    triton_grouped.config_of, triton_grouped.FEW_PAIRS = rule, few
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", nargs="+", default=list(LAYERS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 512])
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
