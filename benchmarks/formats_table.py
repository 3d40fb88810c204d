"""What was measured, where people look: the table of docs/methods/comparison.md and the `# measured:` lines of recipes.

    python benchmarks/formats_table.py

Rows come from benchmarks/results/formats.json (`formats.py`), sorted by bits and KL. The columns of speed are times through a
linear in formats_speed.json (`formats_speed.py`): of one token over that of 4-bit integers, on a CPU and on a GPU, and between
them, on a CPU, of 1 and 16 tokens over integers that read as many bytes. A recipe gets the line of the row whose quantize stage
is its own, and keeps what it has where there is none. The second table has what stages.py measured on the packed models, inputs
rounded and outliers or columns beside the codes (stages_kl.json), the third what bits shared out over layers bring
(allocation.json, `allocation.py`).
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import yaml

from aerogel.recipes.schema import Recipe
from aerogel.recipes.words import words

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "methods" / "comparison.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- from benchmarks/formats_table.py -->\n", "<!-- end -->\n"
BEGIN_STAGES = "<!-- stages, from benchmarks/formats_table.py -->\n"
STAGES_HEAD = """| stage | bits/weight | KL |
|---|--:|--:|
"""
BEGIN_ALLOCATION = "<!-- allocation, from benchmarks/formats_table.py -->\n"
ALLOCATION_HEAD = """| planes | layers of 2, 3, 4 bits | bits/weight | KL |
|---|--:|--:|--:|
"""
MEASURED = "# measured: SmolLM2-135M-Instruct, WikiText-2 raw test, 40 x 1024, no BOS (128 x 512 C4 tokens, formats.json):"
HEAD = """| format | bits/weight | KL | perplexity | MB | CPU, int4 = 1 | CPU, equal bytes = 1 | GPU, int4 = 1 |
|---|--:|--:|--:|--:|--:|--:|--:|
"""


def table(formats: dict[str, Any], speed: dict[str, Any]) -> str:
    """Markdown lines, narrow formats last, at equal bits the nearest to dense first."""
    rows = sorted(formats["rows"].items(), key=lambda item: (-round(item[1]["bits_per_weight"], 1), item[1]["kl"]))
    return HEAD + "".join(_line(name, row, speed) for name, row in rows)


def stages(rows: dict[str, Any]) -> str:
    """Markdown lines of stages in the words of plans and reports, in the order of `table`."""
    ordered = sorted(rows.values(), key=lambda row: (-round(row["bits_per_weight"], 1), row["kl"]))
    lines = []
    for row in ordered:
        said = " -> ".join(map(words, Recipe.load({"aerogel": 1, "stages": row["stages"]}).stages))
        lines.append(f"| {said} | {row['bits_per_weight']:.2f} | {row['kl']:.4f} ± {row['kl_error']:.4f} |\n")
    return STAGES_HEAD + "".join(lines)


def allocation(rows: dict[str, Any]) -> str:
    """Markdown lines, narrow models first."""
    lines = []
    for name, row in sorted(rows.items(), key=lambda item: item[1]["bits_per_weight"]):
        layers = ", ".join(str(row["layers"].get(bits, 0)) for bits in ("2", "3", "4"))
        lines.append(f"| {name} | {layers} | {row['bits_per_weight']:.2f} | {row['kl']:.4f} ± {row['kl_error']:.4f} |\n")
    return ALLOCATION_HEAD + "".join(lines)


def _line(name: str, row: dict[str, Any], speed: dict[str, Any]) -> str:
    kl = f"{row['kl']:.4f} ± {row['kl_error']:.4f}"
    perplexity = f"{math.exp(row['loss']):.2f}"
    cpu, gpu = (_timed(name, row["stage"], speed.get(device, {"rows": {}})["rows"]) for device in ("cpu", "cuda"))
    times = f"{_times(cpu, 'over', ('1',))} | {_times(cpu, 'over_integers', ('1', '16'))} | {_times(gpu, 'over', ('1',))}"
    return f"| {name} | {row['bits_per_weight']:.2f} | {kl} | {perplexity} | {row['bytes'] / 1e6:.1f} | {times} |\n"


def _timed(name: str, stage: dict[str, Any], rows: dict[str, Any]) -> dict[str, Any]:
    """A format's row, however it was solved; nothing where something stands beside the codes, which was not timed there."""
    if any(stage.get(rule, "none") != "none" for rule in ("rows", "outliers", "columns", "transform")):
        return {}
    found: dict[str, Any] = rows.get(name) or {_format(other): row for other, row in rows.items()}.get(_format(name), {})
    return found


def _format(name: str) -> str:
    """The name without the share of the shift."""
    return re.sub(", (plain|a quarter)$", "", name)


def _times(row: dict[str, Any], over: str, tokens: tuple[str, ...]) -> str:
    """Times over another's, as they are written."""
    found = [row[over][M] for M in tokens] if over in row else []
    return ", ".join(f"{each:.2f}" if each < 10 else f"{each:.0f}" for each in found)


def results(name: str) -> dict[str, Any]:
    """A file of benchmarks/results."""
    found: dict[str, Any] = json.loads((RESULTS / name).read_text("utf-8"))
    return found


def page(text: str) -> str:
    """The page with its tables made anew."""
    text = _between(text, BEGIN, table(results("formats.json"), results("formats_speed.json")))
    text = _between(text, BEGIN_STAGES, stages(results("stages_kl.json")["rows"]))
    return _between(text, BEGIN_ALLOCATION, allocation(results("allocation.json")["rows"]))


def _between(text: str, begin: str, made: str) -> str:
    """`text` with what stands between `begin` and the next END replaced."""
    before, rest = text.split(begin)
    return f"{before}{begin}{made}{END}{rest.split(END, 1)[1]}"


def recipe(text: str, rows: dict[str, Any]) -> str:
    """A recipe with its `# measured:` line made anew, where a row has its only stage."""
    stages = yaml.safe_load(text).get("stages", [])
    if len(stages) != 1 or "quantize" not in stages[0]:
        return text
    wanted = _plain(stages[0]["quantize"])
    row = next((row for row in rows.values() if _plain(_whole(row["stage"])) == wanted), None)
    if row is None:
        return text
    perplexity = f"perplexity {math.exp(row['dense_loss']):.2f} -> {math.exp(row['loss']):.2f}"
    line = f"{MEASURED} KL {row['kl']:.3f}, {perplexity}, {row['bits_per_weight']:.2f} bits per weight"
    return re.sub(r"^# measured: .*$", line, text, count=1, flags=re.MULTILINE)


def _whole(stage: dict[str, Any]) -> dict[str, Any]:
    """A row's stage with what `formats.py` adds to it."""
    shift = {"gptaq": True, "gptaq_experts": "plain"} if stage.get("method", "gptq") == "gptq" else {}
    return {"method": "gptq", **shift, **stage}


def _plain(stage: dict[str, Any]) -> dict[str, Any]:
    """Without what says a default."""
    defaults = {"gptaq": False, "gptaq_alpha": 0.5, "gptaq_experts": "error", "symmetric": True, "group_size": None}
    return {key: value for key, value in stage.items() if key not in defaults or defaults[key] != value}


def main() -> None:
    """Write the page and the recipes."""
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
    rows = results("formats.json")["rows"]
    for file in sorted((ROOT / "recipes").glob("*.yaml")):
        text = file.read_text("utf-8")
        # Recipes of integers are measured by accuracy.py beside other tools; those lines stay.
        if "not measured" in text or MEASURED in text:
            file.write_text(recipe(text, rows), "utf-8")


if __name__ == "__main__":
    main()
