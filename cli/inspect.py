"""`aerogel inspect PATH`: what a checkpoint is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aerogel.cli import options
from aerogel.cli.output import session
from aerogel.errors import BadInput

Shape = Annotated[bool, typer.Option("--shape", help="Fit generalized Gaussians to dense weights: entropy, size, error.")]
Step = Annotated[
    float | None,
    typer.Option("--step", metavar="X", help="Step of the codes of --shape, in standard deviations.  [default: 0.25]"),
]
DeepShape = Annotated[
    float | None, typer.Option("--deepshape", metavar="NU", help="With --shape: the same after matching histograms to this nu.")
]

if TYPE_CHECKING:
    from rich.console import RenderableType


def command(
    model: options.RequiredModel,
    shape: Shape = False,
    step: Step = None,
    deepshape: DeepShape = None,
    json: options.Json = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Show architecture, tensors, formats, bits per weight and sizes of a checkpoint, dense or quantized by anyone."""
    with session(json=json, quiet=quiet, debug=debug) as output:
        from aerogel.model.inspect import inspect

        found = inspect(model)
        tables = list(_tables(found))
        if shape:
            from aerogel.model.shape import STEP, shape_report

            found["shape"] = shape_report(model, STEP if step is None else step, deepshape)
            tables.append(_shapes(found["shape"]))
        elif step is not None or deepshape is not None:
            raise BadInput("--step and --deepshape say how shapes are looked at; add --shape")
        if not quiet:
            output.show(*tables)
        output.result(found)


def _shapes(found: Mapping[str, Any]) -> RenderableType:
    from aerogel.cli.show import plain_table
    from aerogel.eval.table import number

    heads = ["name", ">count", ">nu", ">entropy, bits", ">Golomb, bits", ">error"]
    keys = ("shape", "entropy_bits", "golomb_bits", "error")
    title = f"shape of the weights (emulation), codes of {found['step']:g} standard deviations"
    if found["nu"] is not None:
        title += f"; then DeepShape to nu {found['nu']:g}, not trained"
        heads += [">then: entropy", ">Golomb", ">error", ">weights moved"]
    rows = []
    for row in found["kinds"]:
        cells = [row["name"], row["count"], *(number(row[key]) for key in keys)]
        if "deepshape" in row:
            cells += [number(row["deepshape"][key]) for key in (*keys[1:], "moved")]
        rows.append(cells)
    return plain_table(title, tuple(heads), rows)


def _tables(found: Mapping[str, Any]) -> Iterable[RenderableType]:
    from aerogel.cli.show import count, plain_table, summary
    from aerogel.eval.table import number, size

    facts: list[tuple[str, object]] = [
        ("model", f"{found['model_type']} ({', '.join(found['architectures'])})"),
        ("dtype", found["dtype"]),
        ("parameters", count(found["parameters"])),
        ("bytes", size(found["bytes"])),
        *((key.replace("_", " "), value) for key, value in found["architecture"].items()),
    ]
    if found["quantization"]:
        quantization = found["quantization"]
        if quantization["layers"]:
            facts.append(
                ("quantized by", f"{quantization['method']}, {quantization['format']}, {quantization['layers']} layers")
            )
        facts.append(("layout", quantization["layout"]))
        facts += [("scheme", _scheme(scheme)) for scheme in quantization["schemes"]]
        facts += [("beside the codes", f"{what}, {layers} layers") for what, layers in quantization["beside"].items()]
        if quantization["entropy_coded"]:
            facts.append(("files", "entropy coded, lossless"))
        if found["bits_per_weight"] is not None:
            facts.append(("bits per weight", number(found["bits_per_weight"])))
    if found["experts"]:
        facts.append(("packed experts", f"{len(found['experts']['packed'])} layers run them as they are"))
        for reason in dict.fromkeys(found["experts"]["dense"].values()):
            layers = [layer for layer, why in found["experts"]["dense"].items() if why == reason]
            facts.append(
                ("experts decoded at load", f"{layers[0]}{f' and {len(layers) - 1} more' * (len(layers) > 1)}: {reason}")
            )
    yield plain_table(found["path"], ("fact", "value"), facts)
    yield plain_table(
        f"{found['tensors']} tensors",
        ("name", ">count", "dtype", ">bytes"),
        ((row["name"], row["count"], row["dtype"], size(row["bytes"])) for row in found["kinds"]),
    )
    if found["report"]:
        yield from summary(found["report"])


def _scheme(scheme: Mapping[str, Any]) -> str:
    """A scheme in a few words: `4-bit nf4, groups of 32`."""
    size, strategy = scheme["group_size"], scheme["strategy"]
    group = f"groups of {size}" if size and size > 0 else "per channel"
    if strategy in ("block", "tensor"):
        group = "blocks of 128 x 128" if strategy == "block" else "per tensor"
    if scheme["type"] == "complex":
        group = "one scale for each axis"
    words = [" ".join(filter(None, [f"{scheme['bits']}-bit", scheme["type"], scheme["kind"]])), group]
    if scheme["symmetric"] is not None:
        words.append("symmetric" if scheme["symmetric"] else "with zero points")
    if scheme["activation_bits"] and scheme["activation_bits"] >= 8:
        words.append(f"inputs rounded to {scheme['activation_bits']}-bit {scheme['activation_type']}")
    return ", ".join(words)
