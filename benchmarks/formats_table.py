"""The table of docs/methods/comparison.md from what was measured: `python benchmarks/formats_table.py` writes it there.

Rows come from benchmarks/results/formats.json (`formats.py`), sorted by bits and KL. The column of speed is the time of one
token through a linear over that of int4 in cpu_lookup.json (`cpu_lookup.py`), for formats that were timed there; a table
costs what any table of its size costs, so formats that are timed are named by their first word.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "methods" / "comparison.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- from benchmarks/formats_table.py -->\n", "<!-- end -->\n"
TIMED = {name: name for name in ("int4", "int3", "nf4", "mxfp4", "nvfp4", "bitmod4", "bitmod3")} | {"kmeans4": "table-per-row"}
"""First word of a format -> its row in cpu_lookup.json."""
HEAD = """| format | bits/weight | KL | perplexity | MB | one token on a CPU, int4 = 1 |
|---|--:|--:|--:|--:|--:|
"""


def table(formats: dict[str, Any], lookup: dict[str, Any]) -> str:
    """Markdown lines, narrow formats last, at equal bits the nearest to dense first."""
    rows = sorted(formats["rows"].items(), key=lambda item: (-round(item[1]["bits_per_weight"], 1), item[1]["kl"]))
    return HEAD + "".join(_line(name, row, lookup["rows"]) for name, row in rows)


def _line(name: str, row: dict[str, Any], timed: dict[str, Any]) -> str:
    found = timed.get(TIMED.get(name.split()[0], ""))
    # A weight with more bits in some rows runs a second, smaller product, which was not timed there.
    speed = f"{found['over']['int4']:.2f}" if found and "rows at" not in name else ""
    kl = f"{row['kl']:.4f} ± {row['kl_error']:.4f}"
    perplexity = f"{math.exp(row['loss']):.2f}"
    return f"| {name} | {row['bits_per_weight']:.2f} | {kl} | {perplexity} | {row['bytes'] / 1e6:.1f} | {speed} |\n"


def page(text: str) -> str:
    """The page with its table made anew."""
    before, rest = text.split(BEGIN)
    formats, lookup = (json.loads((RESULTS / name).read_text("utf-8")) for name in ("formats.json", "cpu_lookup.json"))
    return f"{before}{BEGIN}{table(formats, lookup)}{END}{rest.split(END)[1]}"


def main() -> int:
    """Write the page, or with --check say whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 when the page is not what the JSON says")
    given = parser.parse_args()
    old = PAGE.read_text("utf-8")
    new = page(old)
    if given.check:
        return int(old != new)
    PAGE.write_text(new, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
