"""`N=4096,K=4096,bits=4,group_size=128,device=cuda` as a `Problem`: how `list kernels --problem` is asked.

What is said of the weight's numbers are the keys of a `quantize` stage, checked as a recipe's are: any format and its options.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aerogel.errors import BadInput
from aerogel.lazy import load, nearest

if TYPE_CHECKING:
    from aerogel.kernels.problem import Problem

EXAMPLE = "N=4096,K=4096,M=1,bits=4,group_size=128,symmetric=true,dtype=bfloat16,device=cuda,activations=none,outliers=false"
"""For integers, every key. N and K must be given; the others have the values of a usual 4-bit layer on the CPU."""

DEFAULTS = {"N": "", "K": "", "M": "any", "dtype": "bfloat16", "device": "cpu", "outliers": "false"}
INTEGERS = {"bits": "4", "group_size": "128"}
"""What integers are unless said; other formats have values of their own."""
NUMBERS = ("format", "activations")
"""Keys of every stage that say what its numbers are."""
CHOICES = {"dtype": ("bfloat16", "float16", "float32"), "outliers": ("true", "false")}


def parse(text: str) -> Problem:
    """The problem that `text` describes. Raises `BadInput` naming the key that is unknown, missing or wrong."""
    import torch

    from aerogel.kernels.problem import Problem
    from aerogel.pack.config import choose_format

    pairs = _pairs(text)
    given = {**DEFAULTS, **{key: value for key, value in pairs.items() if key in DEFAULTS}}
    for key, known in CHOICES.items():
        if given[key] not in known:
            raise BadInput(f"--problem {key}={given[key]}: write one of {', '.join(known)}")
    spec = _stage({key: value for key, value in pairs.items() if key not in DEFAULTS})
    grid = spec.at(given["dtype"]).stage.grid
    return Problem(
        format=choose_format(grid, spec.activations).name,
        grid=grid,
        N=_number(given, "N"),
        K=_number(given, "K"),
        M=None if given["M"] == "any" else _number(given, "M"),
        dtype=getattr(torch, given["dtype"]),
        device=given["device"],
        activations=spec.activations,
        outliers=given["outliers"] == "true",
    )


def _pairs(text: str) -> dict[str, str]:
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = part.partition("=")
        if not equals:
            raise BadInput(f"--problem {key} has no value; write for instance {EXAMPLE}")
        found[key] = value
    return found


def _stage(written: dict[str, str]) -> Any:
    """The stage of a recipe that rounds to these numbers."""
    from aerogel.quantize import GRIDS
    from aerogel.recipes import files
    from aerogel.recipes.options import options
    from aerogel.recipes.stages import parse_stages

    name = written.get("format", "int")
    if name not in GRIDS:
        raise BadInput(f"--problem format={name}: there is no such format{nearest(name, GRIDS)}")
    known = (*DEFAULTS, *NUMBERS, *options(load(GRIDS[name])))
    for key in written:
        if key not in known:
            raise BadInput(f"--problem knows no '{key}' of format {name}{nearest(key, known)}")
    said = {**(INTEGERS if name == "int" else {}), **written}
    labels = {key: f"--problem {key}={value}" for key, value in said.items()}
    body: dict[str, files.Plain] = {key: files.value(value, labels[key]) for key, value in said.items()}
    if body.get("group_size") == "channel":
        body["group_size"] = None
    origins: dict[files.Key, str] = {("stages", 0, "quantize", key): label for key, label in labels.items()}
    tree: dict[str, files.Plain] = {"stages": [{"quantize": {"method": "rtn", **body}}]}
    try:
        return parse_stages(files.Document("--problem", tree, origins))[0]
    except BadInput as error:  # nobody wrote a stage
        raise BadInput(str(error).replace("stages.0.quantize.", "")) from None


def _number(given: dict[str, str], key: str) -> int:
    if not given[key]:
        raise BadInput(f"--problem lacks {key}; write for instance {EXAMPLE}")
    if not given[key].isdecimal() or int(given[key]) < 1:
        raise BadInput(f"--problem {key} must be a whole number from 1, found '{given[key]}'")
    return int(given[key])
