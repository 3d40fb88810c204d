"""Merged linears that have weights beside their codes: what stands beside the parts stands beside the whole as well.

Outliers and rows of the parts follow each other, columns must be the same inputs for all. The whole runs with them; the parts
keep theirs for everything else (state dicts, dense weights), as views of the whole's where one is a run of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aerogel.kernels.decode.merge import Merged, Part
from aerogel.kernels.linear import Linear
from aerogel.kernels.sidecars import Product, SidecarLinear
from aerogel.quantize.sidecars import Sidecar, below


class MergedBeside(SidecarLinear, Merged):
    """The packed weight of a whole group with what stands beside it. State dicts hold the parts instead."""

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Nothing, of its children neither."""
        return {} if destination is None else destination


class PartBeside(Part, SidecarLinear):  # type: ignore[misc]  # a part prepares the whole
    """A part whose own sidecars are held by its children as before."""

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight of its rows."""
        return SidecarLinear.dequantize(self, dtype)


def tensors_beside(members: Sequence[Linear]) -> dict[str, Tensor] | None:
    """What stands beside the whole of these; empty where nothing does, None where it cannot be one weight's."""
    parts = [_sidecars(member) for member in members]
    return below(parts, [member.out_features for member in members]) if any(parts) else {}


def share(whole: SidecarLinear, members: Sequence[Linear]) -> None:
    """Lets the parts see the whole's tensors where theirs are a run of them."""
    for key, product in whole.named_children():
        for name, joined in product.named_buffers():
            begin = 0
            for member in members:
                own = getattr(member._modules.get(key), name, None)
                if own is None or own.ndim == 0:
                    continue
                run = joined[begin : begin + len(own)]
                if run.shape == own.shape and torch.equal(run, own):
                    member._modules[key]._buffers[name] = run  # type: ignore[union-attr]
                begin += len(own)


def _sidecars(member: Linear) -> dict[str, Sidecar]:
    return {key: module.sidecar for key, module in member.named_children() if isinstance(module, Product)}
