"""What the emulated methods do to a real model: L-Mul in attention, four-bit products with transforms, shapes and entropies.

    python benchmarks/emulation.py MODEL --ids IDS.safetensors --out benchmarks/results/emulation.json

IDS.safetensors holds `evaluation` [windows, length] token ids. Nothing is timed: emulation is slow, and says nothing of speed.
"""

# make bench: --help

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from aerogel.eval.machine import machine, versions
from aerogel.model.loading import load
from aerogel.quantize.codes import quantized
from aerogel.quantize.emulate.lmul import emulating
from aerogel.quantize.emulate.shape import deepshape, entropy_report
from aerogel.quantize.emulate.training import BLOCK, hadamard, random_signs, rounded_product
from aerogel.quantize.formats.mx import Mx
from aerogel.quantize.formats.nvfp4 import Nvfp4

STEP = 0.25
"""Of the codes whose entropy is reported, in standard deviations."""


def log_probabilities(model: Any, ids_WT: Tensor) -> Tensor:
    """Of every next token, [W, T, V]."""
    return torch.stack([model(row[None]).logits[0].float().log_softmax(-1) for row in ids_WT])


def lmul_rows(model: Any, ids_WT: Tensor) -> list[dict[str, Any]]:
    """KL of the model with L-Mul in its attention to the model itself, by mantissa bits."""
    exact = log_probabilities(model, ids_WT)
    rows = []
    for mantissa in (2, 3, 4, 7, 10):
        with emulating(model, mantissa):
            found = log_probabilities(model, ids_WT)
        kl = (exact.exp() * (exact - found)).sum(-1).mean()
        rows.append({"mantissa": mantissa, "kl": float(kl)})
        print(rows[-1], flush=True)
    return rows


def four_bit_rows(model: Any, ids_WT: Tensor) -> list[dict[str, Any]]:
    """Relative error of the linears' products with both factors in four bits, with and without a transform; mean of layers."""
    inputs: dict[str, Tensor] = {}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}
    names = {module: name for name, module in linears.items()}

    def keep(module: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
        inputs[names[module]] = given[0].flatten(0, -2)

    hooks = [module.register_forward_pre_hook(keep) for module in linears.values()]
    model(ids_WT[:1])
    for hook in hooks:
        hook.remove()
    rows = []
    for grid in (Mx(), Nvfp4()):
        for transform in (False, True):
            errors: dict[str, list[float]] = {}
            generator = torch.Generator().manual_seed(0)
            for name, module in linears.items():
                x, w = inputs[name].float(), module.weight.float()
                exact = x @ w.T
                found = rounded_product(x, w, grid, generator, transform=transform)
                errors.setdefault(name.rpartition(".")[2], []).append(float((found - exact).norm() / exact.norm()))
            means = {leaf: round(sum(held) / len(held), 4) for leaf, held in errors.items()}
            rows.append({"format": type(grid).__name__.lower(), "hadamard": transform, "error": means})
            print(rows[-1], flush=True)
    return rows


def weight_rows(model: Any) -> list[dict[str, Any]]:
    """Error of weights in MXFP4 and NVFP4, plain and transformed."""
    rows = []
    for grid in (Mx(), Nvfp4()):
        lost = {False: [0.0, 0.0], True: [0.0, 0.0]}
        generator = torch.Generator().manual_seed(0)
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and ".layers." in name and module.in_features % BLOCK == 0:
                for transform in lost:
                    w = module.weight.float()
                    w = hadamard(w, random_signs(w.shape[1], generator)) if transform else w
                    back = quantized(grid, w, grid.fit(w)).decode()
                    lost[transform][0] += float((w - back).square().sum())
                    lost[transform][1] += float(w.square().sum())
        row = {"format": type(grid).__name__.lower(), **{f"hadamard {t}": a / b for t, (a, b) in lost.items()}}
        rows.append(row)
        print(row, flush=True)
    return rows


def shape_rows(model: Any, every: int) -> list[dict[str, Any]]:
    """Fitted shapes and entropies by kind of linear, and what DeepShape would make of them."""
    by_leaf: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name and int(name.split(".")[2]) % every == 0:
            by_leaf.setdefault(name.rpartition(".")[2], []).append(module.weight.float())
    rows = []
    for leaf, weights in by_leaf.items():
        for target in (None, 1.0, 0.5):
            reports = []
            for w in weights:
                shaped = w if target is None else deepshape(w, target)
                reports.append(entropy_report(shaped, STEP * float(w.std())))
            keys = ("shape", "entropy_bits", "golomb_bits", "error")
            means = {key: round(sum(getattr(r, key) for r in reports) / len(reports), 4) for key in keys}
            moved = [float((deepshape(w, target) - w).norm() / w.norm()) for w in weights] if target is not None else [0.0]
            rows.append({"linear": leaf, "target": target, **means, "moved": round(sum(moved) / len(moved), 4)})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measures and prints."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("model", type=Path)
    options.add_argument("--ids", type=Path, required=True)
    options.add_argument("--windows", type=int, default=2)
    options.add_argument("--length", type=int, default=128)
    options.add_argument("--every", type=int, default=10, help="fit shapes in every so manyth layer")
    options.add_argument("--only", nargs="+", help="parts to run: lmul_attention takes minutes, the others one")
    options.add_argument("--out", type=Path)
    chosen = options.parse_args()
    ids_WT = load_file(chosen.ids)["evaluation"][: chosen.windows, : chosen.length].long()
    model = load(chosen.model, dtype=torch.float32)
    with torch.inference_mode():
        parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "lmul_attention": lambda: lmul_rows(model, ids_WT),
            "four_bit_products": lambda: four_bit_rows(model, ids_WT),
            "four_bit_weights": lambda: weight_rows(model),
            "shapes": lambda: shape_rows(model, chosen.every),
        }
        found = {name: run() for name, run in parts.items() if name in (chosen.only or parts)}
    if chosen.out:
        setting = {"windows": chosen.windows, "length": chosen.length, "model": chosen.model.name}
        held = {"command": " ".join(sys.argv), "machine": machine(), "versions": versions(), "setting": setting, **found}
        chosen.out.write_text(json.dumps(held, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
