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
import contextlib
import json
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aerogel.eval.machine import machine, versions
from aerogel.eval.report import read_report
from aerogel.model.source import resolve


def aerogel(*words: object) -> None:
    """One command of the tool; stops where it stops."""
    subprocess.run([sys.executable, "-m", "aerogel", *map(str, words)], check=True)


def compressed(given: argparse.Namespace, recipe: str | Path, out: Path, *settings: str) -> Path:
    """The model compressed by a recipe, in `out`; as it is if it is there already."""
    from stages import CALIBRATION

    source = {"source": f"{given.ids}:calibration", **CALIBRATION}
    calibration = (f"calibration.{key}={value}" for key, value in source.items())
    if not (out / "aerogel_report.json").is_file():
        sets = (word for setting in (*calibration, *settings) for word in ("--set", setting))
        aerogel("compress", given.model, "--recipe", recipe, "--out", out, "--device", given.device, *sets)
    return out


def models(given: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """Those of one width in every layer, then those of widths shared out, by name."""

    def same(bits: int) -> Path:
        return compressed(given, given.recipe, folder / f"w{bits}", f"quantize.bits={bits}")

    def mixed(average: float) -> Path:
        recipe = folder / f"average-{average:g}.yaml"
        aerogel("allocate", *widths, "--average", average, "--out", recipe, "--overwrite")
        return compressed(given, recipe, folder / f"average-{average:g}")

    with ThreadPoolExecutor(given.jobs) as jobs:
        widths = list(jobs.map(same, given.widths))
        averages = list(jobs.map(mixed, given.averages))
    names = [f"{bits} bits in every layer" for bits in given.widths] + [
        f"{average:g} bits on average" for average in given.averages
    ]
    return dict(zip(names, [*widths, *averages], strict=True))


def row(given: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Bits per weight, the divergence, how many layers have which width, and the sum of what `allocate` goes by."""
    from stages import divergence

    report = read_report(out / "aerogel_report.json")
    layers = [layer for block in report["blocks"] for layer in block["layers"]]
    return {
        "bits_per_weight": report["size"]["bits_per_weight"],
        **divergence(given.model, out, given.ids, given.device),
        "layers": {str(bits): count for bits, count in sorted(Counter(layer["bits"] for layer in layers).items())},
        "loss": sum(layer["loss"] for layer in layers),
    }


def main() -> None:
    """Make the models, and write a row for each as it comes."""
    sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", default="w3-shift")
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--averages", type=float, nargs="+", default=[3.0])
    parser.add_argument("--folder", type=Path, help="where models stay; without it they are gone in the end")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="models that are made side by side")
    given = parser.parse_args()
    given.model = resolve(given.model)
    result: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "machine": machine(), "versions": versions()}
    result |= {"recipe": given.recipe, "rows": {}}
    with contextlib.nullcontext(given.folder) if given.folder else tempfile.TemporaryDirectory() as folder:
        for name, out in models(given, Path(folder)).items():
            result["rows"][name] = row(given, out)
            sys.stdout.write(f"{name}: {result['rows'][name]}\n")
            sys.stdout.flush()
            given.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
