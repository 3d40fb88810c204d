"""`aerogel export PATH -o OUT`: a checkpoint as another one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from aerogel.cli import options
from aerogel.cli.output import session

KINDS = {
    "dense": "ordinary weights that any tool loads",
    "coded": "the same weights, entropy coded: lossless, smaller on disk",
    "plain": "entropy coding undone",
    "bitnet": "ternary weights in BitNet's layout, for transformers",
}
WORDS = "; ".join(f"{name}: {what}" for name, what in KINDS.items())
To = Annotated[str, typer.Option("--to", metavar="FORMAT", help=f"{WORDS}.")]
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
    """Write a checkpoint in another form: dense, in another layout, entropy coded, for BitNet; no code or weight changes."""
    with session(json=json, quiet=quiet, debug=debug) as output:
        from aerogel.cli.show import rich_table
        from aerogel.errors import BadInput
        from aerogel.eval.table import NOT_CODED, coding_table
        from aerogel.model.source import resolve

        if to not in KINDS:
            raise BadInput(f"unknown export format '{to}'; known: {', '.join(KINDS)}")
        from aerogel.model.pipeline import pick_device
        from aerogel.pack import export

        source = resolve(model)
        result: dict[str, Any] = {"model": str(model), "out": str(out), "to": to}
        if layout is not None:
            found = export.export_layout(source, out, layout, device=pick_device(device), overwrite=overwrite)
            output.show(f"{out}: {model} in the layout {found}")
            result = {"model": str(model), "out": str(out), "layout": found}
        elif to == "coded":
            rows = [saving.as_row() for saving in export.export_coded(source, out, overwrite=overwrite)[1]]
            output.show(rich_table(coding_table({"entropy": rows}) or NOT_CODED))
            output.show(f"{out}: entropy coded weights of {model}")
            result["tensors"] = rows
        elif to == "plain":
            export.export_plain(source, out, overwrite=overwrite)
            output.show(f"{out}: weights of {model} without entropy coding")
        elif to == "bitnet":
            from aerogel.pack.to_bitnet import export_bitnet

            export_bitnet(source, out, overwrite=overwrite)
            output.show(f"{out}: ternary weights of {model} as BitNet packs them")
        else:
            export.export_dense(source, out, overwrite=overwrite)
            output.show(f"{out}: dense weights of {model}")
        output.result(result)
