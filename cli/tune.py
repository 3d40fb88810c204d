"""`aerogel tune MODEL`: which configuration of a kernel is fastest for the layers of a model, on this machine."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aerogel.cli import options
from aerogel.cli.output import session
from aerogel.cli.progress import progress

if TYPE_CHECKING:
    from aerogel.kernels.problem import Problem

MaybeModel = Annotated[str | None, typer.Argument(metavar="MODEL", help="A compressed checkpoint: local folder or hub id.")]
One = Annotated[
    str | None,
    typer.Option("--problem", metavar="KEY=VALUE,...", help="One matmul instead: `N=64,K=64,bits=4,device=cuda`."),
]
Tokens = Annotated[str, typer.Option("--tokens", metavar="1,16", help="Numbers of tokens to measure.")]


def command(
    model: MaybeModel = None,
    problem: One = None,
    tokens: Tokens = "1,2,4,8,16",
    device: options.Device = "auto",
    json: options.Json = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
    threads: options.Threads = None,
) -> None:
    """Find the fastest kernel configurations for the layers of a compressed model on this machine, and keep them.

    Without it a table for known devices, else a rule, decides. What is found is used by every later run on this machine.
    """
    with session(json=json, quiet=quiet, debug=debug, threads=threads) as output:
        from aerogel.cli.problem import parse
        from aerogel.errors import BadInput
        from aerogel.kernels.dispatch import choose

        if (model is None) == (problem is None):
            raise BadInput("write either a MODEL to tune for, or one matmul with --problem")
        counts = _counts(tokens)
        problems = [parse(problem)] if problem is not None else problems_of(str(model), device)
        rows: list[dict[str, Any]] = []
        with progress(quiet=quiet) as watch:
            for done, asked in enumerate(problems):
                watch("tune", done, len(problems), {"layer": f"{asked.N}x{asked.K}"})
                name, kernel = choose(asked)
                tuned = kernel.tune(asked, counts)
                found = {} if tuned is None else {str(count): text for count, text in tuned.found.items()}
                kept = None if tuned is None else str(tuned.kept)
                rows.append({"layer": f"{asked.N}x{asked.K}", "kernel": name, "found": found, "kept": kept})
            watch("tune", len(problems), len(problems))
        if not quiet:
            from aerogel.cli.show import plain_table

            lines = [line for row in rows for line in _lines(row)]
            output.show(plain_table("tuned", ("layer", "kernel", "tokens", "fastest"), lines))
        output.result({"tuned": rows})


def problems_of(model: str, device: str) -> list[Problem]:
    """The distinct matmuls of a compressed model as it is loaded for decoding. Raises `BadInput` where it has none."""
    from aerogel.errors import BadInput
    from aerogel.kernels.linear import Linear
    from aerogel.kernels.sidecars import OutlierProduct
    from aerogel.model.loading import load
    from aerogel.model.pipeline import pick_device
    from aerogel.model.source import resolve

    loaded = load(resolve(model), device=pick_device(device), merge=True)
    layers = [module for module in loaded.modules() if isinstance(module, Linear)]
    if not layers:
        raise BadInput(f"{model} has no packed layers to tune for; give a checkpoint that was quantized")
    beside = [any(isinstance(child, OutlierProduct) for child in layer.children()) for layer in layers]
    return list(dict.fromkeys(replace(layer.problem(), outliers=here) for layer, here in zip(layers, beside, strict=True)))


def _counts(text: str) -> list[int]:
    from aerogel.errors import BadInput

    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise BadInput(f"--tokens must be whole numbers from 1, separated by commas, found '{text}'")
    return sorted({int(part) for part in parts})


def _lines(row: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    found = row["found"] or {"": "nothing to choose"}
    return [(row["layer"], row["kernel"], count, text) for count, text in found.items()]
