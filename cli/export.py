"""`aerogel export PATH -o OUT`: a quantized checkpoint as another one."""

from __future__ import annotations

from typing import Annotated

import typer

from aerogel.cli import options
from aerogel.cli.output import session

To = Annotated[str, typer.Option("--to", metavar="FORMAT", help="dense: ordinary weights that any tool loads.")]
Layout = Annotated[
    str | None,
    typer.Option(
        "--layout",
        metavar="NAME",
        help="Keep it compressed: portable, native (for this machine), native-cpu or native-cuda.",
    ),
]


def command(
    model: options.RequiredModel,
    out: options.RequiredOut,
    to: To = "dense",
    layout: Layout = None,
    device: options.Device = "auto",
    json: options.Json = None,
    quiet: options.Quiet = False,
    overwrite: options.Overwrite = False,
    debug: options.Debug = False,
) -> None:
    """Write a quantized checkpoint with dense weights, or in another layout; every bit stays what the kernels compute with."""
    with session(json=json, quiet=quiet, debug=debug) as output:
        from aerogel.errors import BadInput
        from aerogel.model.source import resolve

        if to != "dense":
            raise BadInput(f"unknown export format '{to}'; known: dense")
        from aerogel.model.pipeline import pick_device
        from aerogel.pack.export import export_dense, export_layout

        source = resolve(model)
        if layout is not None:
            found = export_layout(source, out, layout, device=pick_device(device), overwrite=overwrite)
            output.show(f"{out}: {model} in the layout {found}")
            output.result({"model": str(model), "out": str(out), "layout": found})
            return
        export_dense(source, out, overwrite=overwrite)
        output.show(f"{out}: dense weights of {model}")
        output.result({"model": str(model), "out": str(out), "to": to})
