"""`aerogel bench OUT --against MODEL`: compressed against dense, accuracy and speed, measured side by side."""

from __future__ import annotations

from typing import Annotated

import typer

from aerogel.cli import options
from aerogel.cli.evaluate import header, settings_for
from aerogel.cli.output import session
from aerogel.cli.progress import progress

Batch = Annotated[str | None, typer.Option("--batch", metavar="1,16", help="Batch sizes.")]
Prompt = Annotated[int | None, typer.Option("--prompt", metavar="N", min=1, help="Prompt tokens.")]
NewTokens = Annotated[int | None, typer.Option("--new-tokens", metavar="N", min=2, help="Tokens to generate.")]
Repeats = Annotated[int | None, typer.Option("--repeats", metavar="N", min=1, help="Timed repetitions.")]
SpeedOnly = Annotated[bool, typer.Option("--speed-only", help="Leave out the quality beside --against.")]


def command(
    model: options.RequiredModel,
    against: options.Against = None,
    recipe: options.MaybeRecipe = None,
    batch: Batch = None,
    prompt: Prompt = None,
    new_tokens: NewTokens = None,
    repeats: Repeats = None,
    speed_only: SpeedOnly = False,
    activations: options.Activations = None,
    bits: options.Bits = None,
    set_: options.Set = None,
    device: options.Device = "auto",
    json: options.Json = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
    threads: options.Threads = None,
) -> None:
    """Measure load time, prefill and decode speed, and memory; with --against, side by side and with the quality."""
    with session(json=json, quiet=quiet, debug=debug, threads=threads) as output:
        from aerogel.model.pipeline import measure, pick_device
        from aerogel.model.stored_bits import at_bits
        from aerogel.recipes.sections import Bench

        given = {
            "bench.batch": None if batch is None else f"[{batch}]",
            "bench.prompt": prompt,
            "bench.new_tokens": new_tokens,
            "bench.repeats": repeats,
            "bench.activations": activations,
            "evaluate.activations": activations if against is not None and not speed_only else None,
        }
        changes = [f"{key}={value}" for key, value in given.items() if value is not None]
        settings = settings_for(model, recipe, [*(set_ or ()), *changes])
        quality = settings.evaluate if against is not None and not speed_only else None
        with at_bits(bits), progress(quiet=quiet) as watch:
            report = header(model, against) | measure(
                model, against, quality, settings.bench or Bench(), device=pick_device(device), progress=watch
            )
        if not quiet:
            from aerogel.cli.show import summary

            output.show(*summary(report))
        output.result(report)
