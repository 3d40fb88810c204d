"""`aerogel compress MODEL -r RECIPE -o OUT`: one command, a checkpoint that loads and runs fast."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from aerogel.cli import options
from aerogel.cli.output import session
from aerogel.cli.progress import progress

Layout = Annotated[
    str | None,
    typer.Option("--layout", metavar="NAME", help="portable, native (for this machine), native-cpu or native-cuda."),
]


def command(
    model: options.Model = None,
    recipe: options.Recipe = "w4",
    out: options.Out = None,
    set_: options.Set = None,
    layout: Layout = None,
    device: options.Device = "auto",
    json: options.Json = None,
    quiet: options.Quiet = False,
    overwrite: options.Overwrite = False,
    debug: options.Debug = False,
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Compress a model. Killed at any time, the same command continues where it stopped."""
    with session(json=json, quiet=quiet, debug=debug, threads=threads) as output:
        from aerogel.model.compress import compress
        from aerogel.model.pipeline import default_out, pick_device, source_of
        from aerogel.recipes.schema import Recipe

        checked = Recipe.load(recipe, [*(set_ or ()), *([f"pack.layout={layout}"] if layout else ())])
        source = source_of(model, checked)
        folder = out or default_out(source, checked)
        with progress(quiet=quiet) as watch:
            report = compress(
                source,
                checked,
                folder,
                device=pick_device(device),
                overwrite=overwrite,
                trust_remote_code=trust_remote_code,
                progress=watch,
                command=command_line(),
            )
        if not quiet:
            from aerogel.cli.show import summary

            output.show(
                *summary(report), f"{folder}: done. Compare with the original: aerogel eval {folder} --against {source}"
            )
        output.result(report)


def command_line() -> str:
    """The command as it was typed, for the report: `aerogel` and its arguments."""
    import shlex

    return shlex.join(["aerogel", *sys.argv[1:]])
