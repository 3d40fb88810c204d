"""Perplexity of SmolLM2-135M through the CPU kernels, against the same weights computed in float32.

    python benchmarks/cpu_perplexity.py --folder FOLDER --windows 8 --length 512

One checkpoint (round to nearest, 4 bits, groups of 64) is run in several ways on the same windows of text:

    float32 dense      decoded weights, torch in float32: the reference, nearest to exact arithmetic
    float32 cpu        the packed weights through the kernels, exact arithmetic
    float32 cpu-int8   the same with activations rounded to int8
    bfloat16 ...       the same three with activations (and decoded weights) in bfloat16

Everything but the linears is torch's in every way. For each: perplexity relative to the reference, with the error paired by
window, and the mean KL divergence from it, which shows how far the distributions are apart where perplexities happen to agree.
The text is the package's default evaluation text; windows do not overlap and begin as the tokenizer has it.

What was measured of a window is kept in FOLDER, with the checkpoint: called again, the script goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aerogel.eval.machine import machine, versions
from aerogel.eval.quality import divergence, increase_of
from aerogel.kernels.linear import Linear, round_activations
from aerogel.model.calibration import load_tokens
from aerogel.model.compress import compress
from aerogel.model.loading import load
from aerogel.model.pipeline import tokenizer_of
from aerogel.model.source import resolve
from aerogel.pack.export import export_dense

RECIPE = {"aerogel": 1, "stages": [{"quantize": {"method": "rtn", "bits": 4, "group_size": 64}}]}
REFERENCE = "float32 dense"


def ways(folder: Path) -> dict[str, Any]:
    """Name to model."""
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        found[f"{name} dense"] = load(folder / "dense", dtype=dtype)
        found[f"{name} cpu"] = load(folder / "packed", dtype=dtype)
        found[f"{name} cpu-int8"] = load(folder / "packed", dtype=dtype)
        round_activations(found[f"{name} cpu-int8"])
        for kernel in ("cpu", "cpu-int8"):
            ran = {module.kernel_name for module in found[f"{name} {kernel}"].modules() if isinstance(module, Linear)}
            if ran != {kernel}:
                raise SystemExit(f"wanted {kernel} in every linear, found {ran}")
    return found


@torch.inference_mode()
def log_probabilities(model: Any, ids_T: Tensor) -> Tensor:
    return torch.log_softmax(model(ids_T[None]).logits[0, :-1].float(), -1)


def window_of(models: dict[str, Any], ids_T: Tensor) -> dict[str, tuple[float, float]]:
    """Mean loss and KL from the reference of each way."""
    reference = log_probabilities(models[REFERENCE], ids_T)
    rows = {}
    for name, model in models.items():
        found = reference if name == REFERENCE else log_probabilities(model, ids_T)
        loss = -found.gather(1, ids_T[1:, None]).double().mean().item()
        rows[name] = (loss, divergence(reference, found).double().mean().item())
    return rows


def measure(models: dict[str, Any], ids_WT: Tensor, place: Path) -> dict[str, dict[str, Any]]:
    for window, ids_T in enumerate(ids_WT):
        file = place / f"window{window}x{len(ids_T)}.json"
        if not file.is_file():
            file.write_text(json.dumps(window_of(models, ids_T)), "utf-8")
        sys.stderr.write(f"window {window + 1} of {len(ids_WT)}\n")
    return summary([json.loads((place / f"window{i}x{ids_WT.shape[1]}.json").read_text("utf-8")) for i in range(len(ids_WT))])


def summary(rows: list[dict[str, list[float]]]) -> dict[str, dict[str, Any]]:
    losses = {name: [row[name][0] for row in rows] for name in rows[0]}
    kl = {name: [row[name][1] for row in rows] for name in rows[0]}
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    return {
        name: {
            "perplexity": math.exp(mean(losses[name])),
            **increase_of(losses[REFERENCE], losses[name]),
            "kl": mean(kl[name]),
            "loss_by_window": losses[name],
        }
        for name in losses
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a checkpoint or GGUF file, the demo's unless given")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint and the windows' results are kept")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu_perplexity.json")
    given = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
    from smollm2 import gguf

    source = resolve(given.model or gguf())
    if not (given.folder / "dense").is_dir():
        compress(source, RECIPE, given.folder / "packed", device="cpu", overwrite=True)
        export_dense(given.folder / "packed", given.folder / "dense")
    tokens = load_tokens(
        "default", tokenizer_of(source), rows=given.windows, length=given.length, seed=None, purpose="evaluation"
    )
    rows = measure(ways(given.folder), tokens.ids, given.folder)
    for name, row in rows.items():
        error = row["increase_se"] or 0.0
        sys.stdout.write(f"{name:18} {row['perplexity']:9.4f} {row['increase']:+9.4%} ± {error:.4%}  KL {row['kl']:.2e}\n")
    report = {
        "command": " ".join(["benchmarks/cpu_perplexity.py", *sys.argv[1:]]),
        "machine": machine(),
        "versions": versions(),
        "recipe": RECIPE,
        "text": tokens.facts(),
        "windows": given.windows,
        "length": given.length,
        "reference": REFERENCE,
        "rows": rows,
    }
    given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
