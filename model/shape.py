"""How the weights of a dense checkpoint are distributed, and what codes of one step would cost: the facts of `inspect --shape`.

One matrix at a time, of which `SAMPLE` weights at even distances stand for all. The step is a share of each matrix's own
standard deviation, so that rows can be compared. See `quantize/emulate/shape.py` for what is fitted.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.model.inspect import collapse
from aerogel.model.reader import CheckpointReader
from aerogel.model.source import resolve
from aerogel.quantize.emulate.shape import deepshape, entropy_report

SAMPLE = 1 << 18
STEP = 0.25
"""Of a standard deviation: some four bits of entropy for a normal weight."""
DENSE = (torch.float32, torch.float16, torch.bfloat16)


def shape_report(model: str | Path, step: float = STEP, nu: float | None = None) -> dict[str, Any]:
    """Fitted shapes and entropies of all matrices of a dense checkpoint, blocks taken together.

    Args:
        model: folder, hub id or GGUF file.
        step: of the codes, in standard deviations of each matrix.
        nu: the shape that DeepShape gives each matrix, for the same facts afterwards; None for not.

    Returns:
        {"step", "nu", "sample": weights looked at of each matrix, "kinds": [{"name", "count", "shape", "entropy_bits",
        "golomb_bits", "error", and with nu "deepshape": the same four and "moved": |w' - w|^2 / |w|^2}]}, means over `count`.

    Raises:
        BadInput: no matrix in a float type (a quantized checkpoint has none), or a step or nu outside what is known.
    """
    reader = CheckpointReader(resolve(model))
    kinds: dict[str, list[dict[str, Any]]] = {}
    for entry in reader:
        if len(entry.shape) < 2 or entry.dtype not in DENSE:
            continue
        weight = sampled(reader.read(entry.name, finite=True))
        if bool(weight.any()):
            kinds.setdefault(collapse(entry.name), []).append(_facts(weight, step, nu))
    if not kinds:
        raise BadInput(f"{model} has no matrix in a float type, so there is no shape to fit; give the dense model")
    rows = [{"name": name, "count": len(found), **_mean(found)} for name, found in kinds.items()]
    return {"step": step, "nu": nu, "sample": SAMPLE, "kinds": rows}


def sampled(weight: Tensor) -> Tensor:
    """At most `SAMPLE` weights at even distances, float32."""
    flat = weight.flatten()
    return flat[:: -(-flat.numel() // SAMPLE)].float()


def _facts(weight: Tensor, step: float, nu: float | None) -> dict[str, Any]:
    size = step * float(weight.std(correction=0))
    found: dict[str, Any] = asdict(entropy_report(weight, size))
    if nu is not None:
        moved = deepshape(weight, nu)
        far = float((moved - weight).double().square().sum() / weight.double().square().sum())
        found["deepshape"] = {**asdict(entropy_report(moved, size)), "moved": far}
    return found


def _mean(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of each fact, and of those inside."""
    return {
        key: _mean([facts[key] for facts in found])
        if isinstance(value, dict)
        else sum(facts[key] for facts in found) / len(found)
        for key, value in found[0].items()
    }
