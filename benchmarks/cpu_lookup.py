"""One token through linears whose codes point into tables, beside integers of the same bits: the price of any number format.

    python benchmarks/cpu_lookup.py --out benchmarks/results/cpu_lookup.json

Microseconds are medians, ratios are medians over rounds in which every contender runs once, all rotating over copies of
their weights that together exceed the last-level cache. Activations are bfloat16; `int4` is the exact path of integers in
groups of 64, `int4-int8` the one that rounds activations to int8. `float32` behind a name: activations in float32, for which
numbers are put together in float32.

# make bench: --rounds 3 --shape 1024x1024
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from aerogel.eval.machine import machine, versions
from aerogel.kernels.gemm import cpu, cpu_lookup
from aerogel.kernels.native import library
from aerogel.pack import lookup, native
from aerogel.quantize.codes import Codes
from aerogel.quantize.formats.bitmod import Bitmod
from aerogel.quantize.formats.floats import Float
from aerogel.quantize.formats.mx import Mx
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.formats.nvfp4 import Nvfp4
from aerogel.quantize.tables import TableGrid

COPY_BYTES = 96 << 20
FORMATS: dict[str, TableGrid] = {
    "nf4": Nf4(scale_dtype=torch.bfloat16),
    "mxfp4": Mx(),
    "nvfp4": Nvfp4(),
    "bitmod4": Bitmod(),
    "bitmod3": Bitmod(bits=3),
    "table-per-row": Float(kind="e2m1", group_size=None),
}


def table_codes(grid: TableGrid, N: int, K: int, per_row: bool) -> Codes:
    groups, tables = grid.groups(K), grid.tables
    pick = torch.randint(len(tables), (N, groups), dtype=torch.uint8) if len(tables) > 1 and not per_row else None
    return Codes(
        values_NK=torch.randint(1 << grid.bits, (N, K), dtype=torch.uint8),
        scale_NG=torch.ones(N, groups).to(grid.scale_dtype),
        table_TE=torch.randn(N, 1 << grid.bits) if per_row else tables,
        pick_NG=pick,
        grid=grid,
    )


def copies(layout: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    size = sum(tensor.nbytes for tensor in layout.values())
    return [{name: tensor.clone() for name, tensor in layout.items()} for _ in range(min(16, -(-COPY_BYTES // size)))]


def contenders(N: int, K: int) -> dict[str, tuple[Callable[[int], Any], int]]:
    """Name to (run number i, bytes of the weight)."""
    x = torch.randn(1, K).bfloat16()
    wide = x.float()
    found: dict[str, tuple[Callable[[int], Any], int]] = {}

    def add(name: str, layout: dict[str, torch.Tensor], run: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        held = copies(layout)
        found[name] = (lambda i: run(held[i % len(held)]), sum(tensor.nbytes for tensor in layout.values()))

    for bits in (3, 4):
        values = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (N, K), dtype=torch.int8)
        layout = {"codes": native.pack_codes(values, bits), "scale": native.pack_factors(torch.rand(N, K // 64).bfloat16())}
        for name, numerics in (("", 0), ("-int8", 1)):
            add(f"int{bits}{name}", layout, lambda w, n=numerics: cpu.linear(x, w["codes"], w["scale"], None, None, N, 64, n))  # type: ignore[misc]
    for name, grid in FORMATS.items():
        layout, group = lookup.tensors_of(table_codes(grid, N, K, name == "table-per-row")), grid.group_size or 0
        add(name, layout, lambda w, g=group: cpu_lookup.linear(x, w, None, N, g, "fixed"))  # type: ignore[misc]
        add(f"{name} float32", layout, lambda w, g=group: cpu_lookup.linear(wide, w, None, N, g, "exact"))  # type: ignore[misc]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x4096")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    N, K = map(int, given.shape.split("x"))
    running = contenders(N, K)
    times: dict[str, list[float]] = {name: [] for name in running}
    for number in range(given.rounds + 1):
        for name, (run, _) in running.items():
            start = time.perf_counter()
            run(number)
            if number:
                times[name].append(time.perf_counter() - start)
    rows = {}
    for name, taken in times.items():
        middle = statistics.median(taken)
        over = {
            base: statistics.median(a / b for a, b in zip(taken, times[base], strict=True)) for base in ("int4", "int4-int8")
        }
        rows[name] = {
            "us": middle * 1e6,
            "least_us": min(taken) * 1e6,
            "GB_per_s": running[name][1] / middle / 1e9,
            "over": over,
        }
        sys.stdout.write(f"{name:24} {rows[name]}\n")
    if given.out:
        report = {
            "command": " ".join(["benchmarks/cpu_lookup.py", *sys.argv[1:]]),
            "machine": machine(),
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "path": library.best(),
            "rows": rows,
        }
        given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
