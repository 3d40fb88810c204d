"""What group sizes buy in ranges and in rounding error, one size for all and as rules choose them; weights only, two minutes.

    python benchmarks/groups.py MODEL --out benchmarks/results/groups.json

MODEL is a folder with safetensors. For every linear of its blocks: bits per weight with 16-bit scales, mean over weights of
the largest magnitude of their group in standard deviations of the matrix, and squared error over squared weights of 4-bit
symmetric integers on the whole range and on a searched one. Rules decide for each matrix alone.
"""

# make bench: --help

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from aerogel.eval.machine import machine, versions
from aerogel.quantize.granularity import Granularity, mean_range
from aerogel.quantize.grids import IntGrid, quantized

Rule = Callable[[Tensor], int | None]
SIZES = (None, 256, 128, 64, 32)
RULES: dict[str, Rule] = {
    **{str(size or "per output"): lambda w, size=size: size for size in SIZES},  # type: ignore[misc]
    "adaptive 64": lambda w: Granularity(granularity="adaptive").group_size(w, 64),
    "adaptive 32": lambda w: Granularity(granularity="adaptive").group_size(w, 32),
    "worth 16": lambda w: Granularity(granularity="worth").group_size(w, 16),
}


def weights(model: Path) -> dict[str, Tensor]:
    """The linears of the blocks, float32 [N, K]."""
    found = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = [name for name in list(tensors.keys()) if ".layers." in name and name.endswith("proj.weight")]
            found |= {name: tensors.get_tensor(name).float() for name in names}
    return found


def error(w_NK: Tensor, size: int | None, search: Any) -> float:
    """Squared error of 4-bit codes in groups of `size`."""
    grid = IntGrid(bits=4, group_size=size)
    return float((quantized(grid, w_NK, grid.fit(w_NK, search=search)).decode() - w_NK).square().sum())


def row(held: dict[str, Tensor], rule: Rule) -> dict[str, Any]:
    """Bits, range and errors under a rule, and which sizes it chose by kind of linear."""
    total = sum(w.numel() for w in held.values())
    norm = sum(float(w.square().sum()) for w in held.values())
    sums: Counter[str] = Counter()
    sizes: dict[str, Counter[str]] = {}
    for name, w in held.items():
        size = rule(w)
        sizes.setdefault(name.split(".")[-2], Counter())[str(size or "per output")] += 1
        share = w.numel() / total
        sums["bits"] += (4 + 16 / (size or w.shape[1])) * share  # type: ignore[assignment]
        sums["range"] += mean_range(w, size or w.shape[1]) / float(w.std()) * share  # type: ignore[assignment]
        sums["error"] += error(w, size, "minmax") / norm  # type: ignore[assignment]
        sums["error_searched"] += error(w, size, "mse") / norm  # type: ignore[assignment]
    return {**sums, "sizes": {kind: dict(chosen) for kind, chosen in sizes.items()}}


def main() -> None:
    """Measures and prints."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    options.add_argument("model", type=Path)
    options.add_argument("--out", type=Path, required=True)
    chosen = options.parse_args()
    held, rows = weights(chosen.model), {}
    for name, rule in RULES.items():
        rows[name] = row(held, rule)
        print(name, rows[name], flush=True)
    kept = {
        "command": " ".join(sys.argv),
        "machine": machine(),
        "versions": versions(),
        "model": chosen.model.name,
        "rows": rows,
    }
    chosen.out.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
