"""What a norm or a gate makes, described instead of computed: `cuda_quantize` rounds it to 8 bits where it is made.

Apart, a norm writes 16 bits for the rounding to read. `settled` makes it without rounding, once, for whoever wants it so.

Shape legend: M tokens, K features.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from aerogel.kernels.decode import ops as _ops  # noqa: F401  (defines the operators)

ACTS = ("silu", "gelu", "gelu_tanh")


@dataclass(slots=True)
class Normed:
    """`aerogel::rms_norm` of x [M, K], bf16 or fp16, with a weight [K] in x's type or float32."""

    x: Tensor
    weight: Tensor
    eps: float
    round_first: bool
    _known: Tensor | None = field(default=None, init=False, repr=False)

    def settled(self) -> Tensor:
        """The norm, [M, K]."""
        if self._known is None:
            self._known = torch.ops.aerogel.rms_norm.default(self.x, self.weight, self.eps, self.round_first)
        return self._known

    def in_pieces(self) -> bool:
        """Whether a thread can read it 16 bytes at a time."""
        return _in_pieces(self.x) and self.weight.is_contiguous() and self.weight.data_ptr() % 16 == 0

    def macros(self) -> dict[str, int]:
        """What specialises `quantize.cu`."""
        return {"MADE": 1, "ROUND_FIRST": int(self.round_first), "WEIGHT32": int(self.weight.dtype == torch.float32)}

    def arguments(self) -> dict[str, int | float]:
        """What its kernel is told, beside x."""
        return {"weight": self.weight.data_ptr(), "eps": self.eps}


@dataclass(slots=True)
class Gated:
    """`aerogel::gate` of x and u [M, K], bf16 or fp16: act(x) * u."""

    x: Tensor
    u: Tensor
    act: str
    _known: Tensor | None = field(default=None, init=False, repr=False)

    def settled(self) -> Tensor:
        """The product, [M, K]."""
        if self._known is None:
            self._known = torch.ops.aerogel.gate.default(self.x, self.u, self.act)
        return self._known

    def in_pieces(self) -> bool:
        """Whether a thread can read it 16 bytes at a time."""
        return _in_pieces(self.x) and _in_pieces(self.u)

    def macros(self) -> dict[str, int]:
        """What specialises `quantize.cu`."""
        return {"MADE": 2, "ACT": ACTS.index(self.act)}

    def arguments(self) -> dict[str, int | float]:
        """What its kernel is told, beside x."""
        return {"u": self.u.data_ptr(), "u_stride": self.u.stride(0)}


Made = Normed | Gated


def _in_pieces(x_MK: Tensor) -> bool:
    return x_MK.data_ptr() % 16 == 0 and x_MK.stride(0) % 8 == 0 and x_MK.stride(1) == 1
