"""What a few stages cost in KL: one model, one set of token ids, one row for each list of stages. On a CPU, minutes a row.

    python benchmarks/stages.py MODEL --ids IDS.safetensors --cases benchmarks/stages_cases.json
        --out benchmarks/results/stages_kl.json

Cases: {name: [stage, ...]} as a recipe has them; `stages_cases.json` makes every row that is kept. Calibrated on 32 x 512
tokens of the ids' `calibration`, KL(dense || compressed) in float32 on 12 windows of 512 tokens of its `evaluation`, as the ids
are, nothing put before them. Rows are written as they come; rows already in the file are not repeated.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from aerogel.eval.machine import machine, versions
from aerogel.eval.quality import evaluate_pair
from aerogel.model.compress import compress
from aerogel.model.loading import load

CALIBRATION = {"samples": 32, "sequence_length": 512}
WINDOWS, LENGTH = 12, 512


def divergence(model: Path, compressed: Path, ids: Path, device: str = "cpu") -> dict[str, float]:
    """KL(dense || compressed) in float32 and its standard error over windows."""
    tokens_WT = load_file(ids)["evaluation"][:WINDOWS, :LENGTH].long()
    pair = (partial(load, path, dtype=torch.float32, device=device) for path in (model, compressed))
    found = evaluate_pair(*pair, tokens_WT)["divergence"]
    return {"kl": found["kl"], "kl_error": found["kl_se"]}


def row(model: Path, ids: Path, stages: list[dict[str, Any]]) -> dict[str, float]:
    """Bits per weight, and the divergence."""
    calibration = {"source": f"{ids}:calibration", **CALIBRATION}
    recipe = {"aerogel": 1, "calibration": calibration, "stages": stages, "evaluate": None, "bench": None}
    with tempfile.TemporaryDirectory() as folder:
        report = compress(model, recipe, Path(folder) / "out")
        found = divergence(model, Path(folder) / "out", ids)
    return {"bits_per_weight": report["size"]["bits_per_weight"], **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--cases", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    result: dict[str, Any] = json.loads(given.out.read_text("utf-8")) if given.out.is_file() else {"rows": {}}
    result |= {"command": " ".join(["python", *sys.argv]), "machine": machine(), "versions": versions()}
    for name, stages in json.loads(given.cases.read_text("utf-8")).items():
        if name in result["rows"]:
            continue
        result["rows"][name] = {"stages": stages, **row(given.model, given.ids, stages)}
        print(name, result["rows"][name], flush=True)
        given.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
