"""Accuracy of recipes on one model at equal bits: perplexity, KL to dense and top-1, every recipe on the same token ids.

    python benchmarks/accuracy.py MODEL --ids IDS.safetensors --out benchmarks/results/accuracy.json \\
        "w4 gptq=quantize: {method: gptq, bits: 4, group_size: 64}" ...

IDS.safetensors holds `calibration` [rows, length] and `evaluation` [windows, length] token ids. Each recipe is a name, `=`
and one or more stages in YAML, separated by ` ; `. Kept tensors and scales are stored as float16; both models compute in
float32. Results are appended to the JSON, one row per recipe.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from aerogel.eval.machine import machine, versions
from aerogel.eval.quality import evaluate_pair
from aerogel.model.compress import compress
from aerogel.model.loading import load
from aerogel.model.source import resolve
from aerogel.pack.export import export_dense


def measure(model: Path, ids: Path, stages: list[dict], rows: int, length: int, device: str, compute: str) -> dict:
    recipe = {
        "aerogel": 1,
        "calibration": {"source": f"{ids}:calibration", "samples": rows, "sequence_length": length, "compute": compute},
        "pack": {"dtype": "float16"},
        "stages": stages,
    }
    folder = Path(tempfile.mkdtemp())
    try:
        start, cpu = time.perf_counter(), time.process_time()
        report = compress(model, recipe, folder / "out", device=device)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
        dense = folder / "out"
        if report["size"]["bits_per_weight"] is not None:
            dense = folder / "dense"
            export_dense(folder / "out", dense)
        windows = load_file(ids)["evaluation"].long()
        quality = evaluate_pair(
            lambda: load(model, dtype=torch.float32, device=device),
            lambda: load(dense, dtype=torch.float32, device=device),
            windows,
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "bits_per_weight": report["size"]["bits_per_weight"],
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "quality": quality,
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("recipes", nargs="+", help="name=stages")
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compute", default="auto")
    given = parser.parse_args()
    model = resolve(given.model)
    for recipe in given.recipes:
        name, _, text = recipe.partition("=")
        stages = [yaml.safe_load(part) for part in text.split(" ; ")]
        row = measure(model, given.ids.resolve(), stages, given.rows, given.length, given.device, given.compute)
        row = {"name": name, "stages": stages, "rows": given.rows, "length": given.length, "compute": given.compute, **row}
        held = (
            json.loads(given.out.read_text())
            if given.out.exists()
            else {"machine": machine(), "versions": versions(), "rows": []}
        )
        held["command"] = "python benchmarks/accuracy.py MODEL --ids IDS --out OUT RECIPE ..."
        held["rows"] = [old for old in held["rows"] if old["name"] != name] + [row]
        given.out.write_text(json.dumps(held, indent=1) + "\n")
        sys.stdout.write(json.dumps({"name": name, "bits": row["bits_per_weight"], **_short(row["quality"])}) + "\n")
        sys.stdout.flush()


def _short(quality: dict) -> dict:
    found = {"perplexity": quality["perplexity"]["compressed"]["perplexity"], **quality["divergence"]}
    return {key: round(value, 4) for key, value in found.items() if isinstance(value, float)}


if __name__ == "__main__":
    main()
