"""`aerogel list WHAT`: the names that recipes and options accept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from aerogel.cli import options
from aerogel.cli.output import session

Row = tuple[str, str]
What = Annotated[str, typer.Argument(metavar="WHAT", help="recipes, methods, formats, kernels, tasks or architectures.")]

ForProblem = Annotated[
    str | None,
    typer.Option(
        "--problem",
        metavar="KEY=VALUE,...",
        help="With kernels: who would run this matmul, and why the others refuse: `N=4096,K=4096,format=nf4,device=cuda`.",
    ),
]


def command(
    what: What = "recipes",
    problem: ForProblem = None,
    json: options.Json = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """List recipes, methods, formats, kernels, tasks or architectures."""
    with session(json=json, quiet=quiet, debug=debug) as output:
        from aerogel.errors import BadInput
        from aerogel.lazy import nearest

        if what not in LISTS:
            raise BadInput(f"there is no list '{what}'{nearest(what, LISTS)}")
        if problem is not None and what != "kernels":
            raise BadInput(f"--problem asks for kernels; write: aerogel list kernels --problem {problem}")
        rows = LISTS[what]() if problem is None else _who_runs(problem)
        if not quiet:
            from aerogel.cli.show import plain_table

            output.show(plain_table(what, ("name", "what it is" if problem is None else "this problem"), rows))
        output.result({what: dict(rows)})


def _recipes() -> list[Row]:
    """Shipped recipes with their `about` line; the methods are not imported for that."""
    from aerogel.recipes import files
    from aerogel.recipes.schema import shipped

    return [(name, str(files.read(path).tree.get("about", ""))) for name, path in shipped().items()]


def _methods() -> list[Row]:
    """Methods of every kind of stage with the first line of their documentation."""
    from aerogel.lazy import load
    from aerogel.recipes.overrides import STAGE_KINDS
    from aerogel.recipes.stages import methods

    return [(f"{kind}: {name}", _idea(load(reference))) for kind in STAGE_KINDS for name, reference in methods(kind).items()]


def _formats() -> list[Row]:
    """What `format` of a quantize stage and of `pack` may be: the numbers of a weight, and the tensors of a file."""
    from aerogel.lazy import load
    from aerogel.pack import FORMATS
    from aerogel.quantize import GRIDS

    tables = {"quantize": GRIDS, "pack": FORMATS}
    rows = [(f"{kind}: {name}", reference) for kind, table in tables.items() for name, reference in table.items()]
    return [(name, _first_sentence(load(reference)).partition("; see")[0]) for name, reference in rows]


def _kernels() -> list[Row]:
    """Kernels of the quantized linear, the preferred one first."""
    from aerogel.kernels.dispatch import GEMM, kernel

    return [(name, kernel(name).about) for name in GEMM]


def _who_runs(problem: str) -> list[Row]:
    """Every kernel with its answer to one problem: runs it, would run it, or why it refuses."""
    from aerogel.cli.problem import parse
    from aerogel.kernels.dispatch import explain

    answers = explain(parse(problem))
    chosen = next(name for name, refusal in answers if refusal is None)
    return [
        (name, ("runs it" if name == chosen else "could run it") if refusal is None else refusal) for name, refusal in answers
    ]


def _tasks() -> list[Row]:
    from aerogel.eval import offline_tasks

    available = offline_tasks.folder() is not None
    where = "documents on this machine" if available else f"needs {offline_tasks.INSTALL} or a network"
    return [(name, where) for name in sorted(offline_tasks.FOLDERS)] + [("...", "any other lm-eval task, from the hub")]


def _architectures() -> list[Row]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [(name, str(found)) for name, found in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items())]


def _first_sentence(thing: object) -> str:
    return (thing.__doc__ or "").strip().split("\n")[0]


def _idea(method: type) -> str:
    """What a method does: its file opens with that."""
    import sys

    return _first_sentence(sys.modules[method.__module__])


LISTS: dict[str, Callable[[], list[Row]]] = {
    "recipes": _recipes,
    "methods": _methods,
    "formats": _formats,
    "kernels": _kernels,
    "tasks": _tasks,
    "architectures": _architectures,
}
