"""Options that several commands share, with one meaning each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="Local folder, hub id or GGUF file; or `model:` in the recipe.")
]
RequiredModel = Annotated[str, typer.Argument(metavar="MODEL", help="Local folder, hub id or GGUF file.")]
Recipe = Annotated[str, typer.Option("--recipe", "-r", metavar="NAME|FILE", help="Shipped recipe or YAML file.")]
MaybeRecipe = Annotated[
    str | None,
    typer.Option("--recipe", "-r", metavar="NAME|FILE", help="Recipe whose settings apply.  [default: the model's own]"),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="Folder to write.  [default: MODEL-RECIPE here]")]
RequiredOut = Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write.")]
Against = Annotated[
    str | None,
    typer.Option("--against", metavar="MODEL", help="The dense model to compare with, measured side by side."),
]
Bits = Annotated[
    int | None, typer.Option("--bits", metavar="N", min=1, help="Read only the first N planes of a model stored as bit planes.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value of the recipe: `quantize.bits=3`. Repeatable."),
]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or cuda:N.")]
Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE|-", help="Write the result as JSON; with `-` nothing else is on stdout."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show nothing but errors.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and library warnings.")]
Activations = Annotated[
    str | None,
    typer.Option("--activations", metavar="stored|int8", help="int8: round the inputs of packed linears, faster on a CPU."),
]
Threads = Annotated[int | None, typer.Option("--threads", metavar="N", min=1, help="CPU threads.  [default: all cores]")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings. Read that code first.")
]
