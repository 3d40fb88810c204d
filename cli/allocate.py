"""`aerogel allocate OUT2 OUT3 OUT4 --average 3 -o mixed.yaml`: bits where they pay, by what each width cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aerogel.cli import options
from aerogel.cli.output import session

Folders = Annotated[
    list[str], typer.Argument(metavar="OUT...", help="The model compressed at several widths, one folder each.")
]
Average = Annotated[float, typer.Option("--average", metavar="BITS", min=1.0, max=8.0, help="Bits per weight not to exceed.")]
File = Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The recipe to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the recipe if it exists.")]


def command(
    folders: Folders,
    average: Average,
    out: File,
    json: options.Json = None,
    quiet: options.Quiet = False,
    overwrite: Overwrite = False,
    debug: options.Debug = False,
) -> None:
    """Write a recipe that gives each layer its own width, so that the summed error is least at an average number of bits."""
    with session(json=json, quiet=quiet, debug=debug) as output:
        import yaml

        from aerogel.errors import BadInput
        from aerogel.eval.report import read_report
        from aerogel.model.writer import disk_errors
        from aerogel.quantize.allocate import allocate, layer_costs, mixed_recipe

        if out.exists() and not overwrite:
            raise BadInput(f"{out} exists; choose another file or pass --overwrite")
        reports = [read_report(Path(folder) / "aerogel_report.json") for folder in folders]
        costs, weights = layer_costs(reports)
        chosen = allocate(costs, weights, average)
        recipe = mixed_recipe(reports[0]["recipe"], chosen)
        with disk_errors(out):
            out.write_text(yaml.safe_dump(recipe, sort_keys=False), "utf-8")
        counts = {bits: sum(found == bits for found in chosen.values()) for bits in sorted(set(chosen.values()))}
        shares = ", ".join(f"{count} at {bits} bits" for bits, count in counts.items())
        output.show(f"{out}: {shares}")
        output.result({"out": str(out), "bits": chosen, "loss": {name: costs[name][bits] for name, bits in chosen.items()}})
