"""Bits shared out over layers against the same bits for every layer: KL of ShiftAddLLM's planes, by commands that users type.

    python benchmarks/allocation.py MODEL --ids IDS.safetensors --out benchmarks/results/allocation.json
        [--recipe w3-shift] [--widths 2 3 4] [--averages 3] [--folder FOLDER] [--device cpu] [--jobs 1]

Compresses at every width (`aerogel compress --set quantize.bits=`), shares bits out (`aerogel allocate --average`), compresses
once more by the recipe which that wrote, and takes KL(dense || compressed) of all of them in float32 as `stages.py` does:
calibrated on 32 x 512 tokens of the ids' `calibration`, 12 windows of 512 tokens of its `evaluation`, as the ids are, nothing
put before them. Models that FOLDER holds already are not made again; --jobs of them are made side by side.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from aerogel.eval.machine import machine, versions
from aerogel.eval.quality import evaluate_pair
from aerogel.eval.report import read_report
from aerogel.model.loading import load
from aerogel.model.source import resolve

SAMPLES, LENGTH, WINDOWS = 32, 512, 12


def aerogel(*words: object) -> None:
    """One command of the tool; stops where it stops."""
    subprocess.run([sys.executable, "-m", "aerogel", *map(str, words)], check=True)


def compressed(given: argparse.Namespace, recipe: str | Path, out: Path, *settings: str) -> Path:
    """The model compressed by a recipe, in `out`; as it is if it is there already."""
    calibration = (
        f"calibration.source={given.ids}:calibration",
        f"calibration.samples={SAMPLES}",
        f"calibration.sequence_length={LENGTH}",
    )
    if not (out / "aerogel_report.json").is_file():
        sets = (word for setting in (*calibration, *settings) for word in ("--set", setting))
        aerogel("compress", given.model, "--recipe", recipe, "--out", out, "--device", given.device, *sets)
    return out


def row(model: Path, out: Path, tokens_WT: torch.Tensor, device: str) -> dict[str, Any]:
    """Bits per weight, KL with its standard error over windows, and how many layers have which width."""
    report = read_report(out / "aerogel_report.json")
    pair = (partial(load, path, dtype=torch.float32, device=device) for path in (model, out))
    found = evaluate_pair(*pair, tokens_WT)["divergence"]
    layers = Counter(layer["bits"] for block in report["blocks"] for layer in block["layers"])
    return {
        "bits_per_weight": report["size"]["bits_per_weight"],
        "kl": found["kl"],
        "kl_error": found["kl_se"],
        "layers": {str(bits): count for bits, count in sorted(layers.items())},
        "loss": sum(layer["loss"] for block in report["blocks"] for layer in block["layers"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", default="w3-shift")
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--averages", type=float, nargs="+", default=[3.0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    given.model = resolve(given.model)
    folder = given.folder or Path(tempfile.mkdtemp())
    tokens_WT = load_file(given.ids)["evaluation"][:WINDOWS, :LENGTH].long()
    result: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "machine": machine(), "versions": versions()}
    result |= {"recipe": given.recipe, "rows": {}}

    def same(bits: int) -> tuple[str, Path]:
        out = compressed(given, given.recipe, folder / f"w{bits}", f"quantize.bits={bits}")
        return f"{bits} bits in every layer", out

    def mixed(average: float) -> tuple[str, Path]:
        recipe = folder / f"average-{average:g}.yaml"
        aerogel("allocate", *widths.values(), "--average", average, "--out", recipe, "--overwrite")
        return f"{average:g} bits on average", compressed(given, recipe, folder / f"average-{average:g}")

    with ThreadPoolExecutor(given.jobs) as jobs:
        widths = dict(jobs.map(same, given.widths))
        averages = dict(jobs.map(mixed, given.averages))
    for name, out in {**widths, **averages}.items():
        result["rows"][name] = row(given.model, out, tokens_WT, given.device)
        sys.stdout.write(f"{name}: {result['rows'][name]}\n")
        sys.stdout.flush()
        given.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
