"""`aerogel export PATH -o OUT`: a quantized checkpoint as another one."""

from __future__ import annotations

from typing import Annotated

import typer

from aerogel.cli import options
from aerogel.cli.output import session

To = Annotated[str, typer.Option("--to", metavar="FORMAT", help="dense: ordinary weights that any tool loads.")]


def command(
    model: options.RequiredModel,
    out: options.RequiredOut,
    to: To = "dense",
    json: options.Json = None,
    quiet: options.Quiet = False,
    overwrite: options.Overwrite = False,
    debug: options.Debug = False,
) -> None:
    """Write a quantized checkpoint with dense weights, bit for bit what the kernels compute with."""
    with session(json=json, quiet=quiet, debug=debug) as output:
        from aerogel.errors import BadInput
        from aerogel.model.source import resolve

        if to != "dense":
            raise BadInput(f"unknown export format '{to}'; known: dense")
        from aerogel.pack.export import export_dense

        source = resolve(model)
        export_dense(source, out, overwrite=overwrite)
        output.show(f"{out}: dense weights of {model}")
        output.result({"model": str(model), "out": str(out), "to": to})
