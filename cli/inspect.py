"""`aerogel inspect PATH`: what a checkpoint is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from aerogel.cli import options
from aerogel.cli.output import session

if TYPE_CHECKING:
    from rich.console import RenderableType


def command(
    model: options.RequiredModel,
    json: options.Json = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Show architecture, tensors, formats, bits per weight and sizes of a checkpoint, dense or quantized by anyone."""
    with session(json=json, quiet=quiet, debug=debug) as output:
        from aerogel.model.inspect import inspect

        found = inspect(model)
        if not quiet:
            output.show(*_tables(found))
        output.result(found)


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
        facts.append(("quantized by", f"{quantization['method']}, {quantization['format']}, {quantization['layers']} layers"))
        facts.append(("layout", quantization["layout"]))
        for scheme in quantization["schemes"]:
            group = scheme["group_size"]
            words = f"{scheme['bits']}-bit {scheme['type']}, {f'groups of {group}' if group else 'per channel'}"
            facts.append(("scheme", f"{words}, {'symmetric' if scheme['symmetric'] else 'with zero points'}"))
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
