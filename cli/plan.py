"""`aerogel plan MODEL -r RECIPE`: what will happen to every tensor, and what it will cost, before any work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aerogel.cli import options
from aerogel.cli.output import session

if TYPE_CHECKING:
    from rich.console import RenderableType

All = Annotated[bool, typer.Option("--all", help="One line per tensor instead of one per kind of tensor.")]


def command(
    model: options.Model = None,
    recipe: options.Recipe = "w4",
    set_: options.Set = None,
    every: All = False,
    json: options.Json = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Show the fate of every tensor, sizes, who will load the result, and the memory and time to expect. Loads no weights."""
    with session(json=json, quiet=quiet, debug=debug) as output:
        from aerogel.model.pipeline import source_of
        from aerogel.model.plan import plan
        from aerogel.recipes.schema import Recipe

        checked = Recipe.load(recipe, set_ or ())
        found = plan(source_of(model, checked), checked)
        if not quiet:
            output.show(*_tables(found, every))
        output.result(found)


def _tables(found: Mapping[str, Any], every: bool) -> Iterable[RenderableType]:
    from aerogel.cli.show import plain_table
    from aerogel.eval.table import number, percent, seconds, size
    from aerogel.model.servers import lines

    rows = found["tensors"] if every else _by_kind(found["tensors"])
    yield plain_table(
        "Plan",
        ("tensor", ">count", "fate", "how / why", ">bits", ">source", ">stored"),
        (
            (
                row["name"],
                row.get("count", 1),
                row["fate"],
                row["why"],
                number(row["bits_per_weight"]),
                size(row["source_bytes"]),
                size(row["bytes"]),
            )
            for row in rows
        ),
    )
    total, memory, time = found["size"], found["memory"], found["time"]
    yield (
        f"{size(total['source_bytes'])} -> {size(total['bytes'])} ({total['basis']}),"
        f" {number(total['compression'], 3)}× smaller; {percent(total['coverage'], 1)} of the weights quantized,"
        f" at {number(total['bits_per_weight'])} bits each"
    )
    yield from lines(found["loads"])
    yield f"peak memory about {size(memory['peak_bytes'])} beside the libraries ({memory['basis']})"
    yield f"about {seconds(time['seconds'])} here ({time['basis']})"


def _by_kind(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows that differ only in the number of the block, or of the expert, as one."""
    from aerogel.model.inspect import collapse

    merged: dict[tuple[object, ...], dict[str, Any]] = {}
    for row in rows:
        key = (collapse(row["name"]), row["fate"], row["why"], row["bits_per_weight"])
        entry = merged.setdefault(key, {**row, "name": key[0], "count": 0, "bytes": 0, "source_bytes": 0})
        entry["count"] += 1
        entry["bytes"] += row["bytes"]
        entry["source_bytes"] += row["source_bytes"]
    return list(merged.values())
