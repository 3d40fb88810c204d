"""`aerogel run recipe.yaml`: compress, evaluate, benchmark and gate; the exit code is the verdict."""

from __future__ import annotations

from typing import Annotated

import typer

from aerogel.cli import options
from aerogel.cli.compress import command_line
from aerogel.cli.failures import GATE_FAILED
from aerogel.cli.output import session
from aerogel.cli.progress import progress

RecipeArgument = Annotated[
    str | None, typer.Argument(metavar="RECIPE", help="Shipped recipe or YAML file; --recipe says the same.")
]


def command(
    recipe: RecipeArgument = None,
    model: options.Model = None,
    recipe_option: options.MaybeRecipe = None,
    out: options.Out = None,
    set_: options.Set = None,
    device: options.Device = "auto",
    json: options.Json = None,
    quiet: options.Quiet = False,
    overwrite: options.Overwrite = False,
    debug: options.Debug = False,
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Run a whole recipe. Exit code 0: every gate passed; 1: one failed. Writes the report beside the checkpoint."""
    with session(json=json, quiet=quiet, debug=debug, threads=threads) as output:
        from aerogel.errors import BadInput
        from aerogel.model.pipeline import default_out, pick_device, run, source_of
        from aerogel.recipes.schema import Recipe

        if recipe_option is not None:
            # `aerogel run MODEL -r RECIPE` reads as `aerogel compress` does.
            recipe, model = recipe_option, recipe if model is None else model
        if recipe is None:
            raise BadInput("no recipe given; name a YAML file or a shipped recipe (`aerogel list recipes`)")
        checked = Recipe.load(recipe, set_ or ())
        folder = out or default_out(source_of(model, checked), checked)
        with progress(quiet=quiet) as watch:
            report, passed = run(
                checked,
                model,
                folder,
                device=pick_device(device),
                overwrite=overwrite,
                trust_remote_code=trust_remote_code,
                progress=watch,
                command=command_line(),
            )
        if not quiet:
            from aerogel.cli.show import summary

            output.show(*summary(report), f"{folder}: {'passed' if passed else 'FAILED its gate'}")
        output.result(report)
    if not passed:
        raise typer.Exit(GATE_FAILED)
