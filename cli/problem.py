"""`N=4096,K=4096,bits=4,group_size=128,device=cuda` as a `Problem`: how `list kernels --problem` is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aerogel.errors import BadInput
from aerogel.lazy import nearest

if TYPE_CHECKING:
    from aerogel.kernels.problem import Problem

EXAMPLE = "N=4096,K=4096,M=1,bits=4,group_size=128,symmetric=true,dtype=bfloat16,device=cuda,activations=none"
"""Every key. N and K must be given; the others have the values of a usual 4-bit layer on the CPU."""

DEFAULTS = {
    "N": "",
    "K": "",
    "M": "any",
    "bits": "4",
    "group_size": "128",
    "symmetric": "true",
    "dtype": "bfloat16",
    "device": "cpu",
    "activations": "none",
}
CHOICES = {
    "symmetric": ("true", "false"),
    "dtype": ("bfloat16", "float16", "float32"),
    "activations": ("none", "int8", "fp8"),
}


def parse(text: str) -> Problem:
    """The problem that `text` describes. Raises `BadInput` naming the key that is unknown, missing or wrong."""
    import torch

    from aerogel.kernels.problem import Problem
    from aerogel.pack.config import choose_format
    from aerogel.quantize.grids import Fp8Grid, IntGrid

    given = {**DEFAULTS, **_pairs(text)}
    for key, known in CHOICES.items():
        if given[key] not in known:
            raise BadInput(f"--problem {key}={given[key]}: write one of {', '.join(known)}")
    grid: IntGrid | Fp8Grid
    if given["bits"] == "fp8":
        grid = Fp8Grid()
    else:
        grid = IntGrid(
            bits=_number(given, "bits"),
            group_size=None if given["group_size"] == "channel" else _number(given, "group_size"),
            symmetric=given["symmetric"] == "true",
        )
    activations = {"none": "none", "int8": "int8", "fp8": "fp8"}[given["activations"]]
    return Problem(
        format=choose_format(grid, activations).name,  # type: ignore[arg-type]
        grid=grid,
        N=_number(given, "N"),
        K=_number(given, "K"),
        M=None if given["M"] == "any" else _number(given, "M"),
        dtype=getattr(torch, given["dtype"]),
        device=given["device"],
        activations=activations,  # type: ignore[arg-type]
    )


def _pairs(text: str) -> dict[str, str]:
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = part.partition("=")
        if key not in DEFAULTS:
            raise BadInput(f"--problem knows no '{key}'{nearest(key, DEFAULTS)}")
        if not equals:
            raise BadInput(f"--problem {key} has no value; write for instance {EXAMPLE}")
        found[key] = value
    return found


def _number(given: dict[str, str], key: str) -> int:
    if not given[key]:
        raise BadInput(f"--problem lacks {key}; write for instance {EXAMPLE}")
    if not given[key].isdecimal() or int(given[key]) < 1:
        raise BadInput(f"--problem {key} must be a whole number from 1, found '{given[key]}'")
    return int(given[key])
