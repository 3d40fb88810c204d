"""`aerogel eval OUT --against MODEL`: perplexity, divergence and tasks of a checkpoint, beside the dense one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from aerogel.cli import options
from aerogel.cli.output import session
from aerogel.cli.progress import progress

if TYPE_CHECKING:
    from aerogel.recipes.schema import Recipe

Tasks = Annotated[str | None, typer.Option("--tasks", metavar="A,B", help="lm-eval tasks; see `aerogel list tasks`.")]
Limit = Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="Documents per task.")]
Windows = Annotated[int | None, typer.Option("--windows", metavar="N", min=1, help="Windows of text to score.")]
Length = Annotated[int | None, typer.Option("--sequence-length", metavar="N", min=2, help="Tokens per window.")]


def command(
    model: options.RequiredModel,
    against: options.Against = None,
    recipe: options.MaybeRecipe = None,
    tasks: Tasks = None,
    limit: Limit = None,
    windows: Windows = None,
    sequence_length: Length = None,
    activations: options.Activations = None,
    bits: options.Bits = None,
    set_: options.Set = None,
    device: options.Device = "auto",
    json: options.Json = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
    threads: options.Threads = None,
) -> None:
    """Measure quality. With --against, also divergence from that model and a paired test per task."""
    with session(json=json, quiet=quiet, debug=debug, threads=threads) as output:
        from aerogel.errors import BadInput
        from aerogel.model.pipeline import measure, pick_device
        from aerogel.model.stored_bits import at_bits

        given = {
            "evaluate.tasks": None if tasks is None else f"[{tasks}]",
            "evaluate.limit": limit,
            "evaluate.perplexity.windows": windows,
            "evaluate.perplexity.sequence_length": sequence_length,
            "evaluate.activations": activations,
        }
        changes = [f"{key}={value}" for key, value in given.items() if value is not None]
        section = settings_for(model, recipe, [*(set_ or ()), *changes]).evaluate
        if section is None:
            raise BadInput("this recipe has evaluate: null; choose another with -r or set evaluate.divergence=true")
        with at_bits(bits), progress(quiet=quiet) as watch:
            report = header(model, against) | measure(model, against, section, None, device=pick_device(device), progress=watch)
        if not quiet:
            from aerogel.cli.show import summary

            output.show(*summary(report))
        output.result(report)


def settings_for(model: str, recipe: str | None, changes: list[str]) -> Recipe:
    """The recipe whose sections apply: the one named, the one the checkpoint was made with, or the default one."""
    from pathlib import Path

    from aerogel.eval.report import read_report
    from aerogel.recipes.schema import Recipe

    if recipe is None:
        own = Path(model) / "aerogel_report.json"
        return Recipe.load(read_report(own)["recipe"] if own.is_file() else "w4", changes)
    return Recipe.load(recipe, changes)


def header(model: str, against: str | None) -> dict[str, object]:
    """The part of a report that says what was measured, with what."""
    from aerogel.cli.compress import command_line
    from aerogel.eval.machine import machine, versions

    found = versions()
    return {
        "aerogel": found.get("aerogel", "source"),
        "command": command_line(),
        "model": model,
        "against": against,
        "machine": machine(),
        "versions": found,
    }
