"""Complex weights of two bits: 1, -1, i or -i times a scale, and the real integer weight that stands for them.

iFairy (PKU 2025, arXiv 2508.05571) trains models whose weights take only these four values, so that a complex product needs
additions alone. A weight goes to the axis it is nearest to; the two axes have a scale each, the mean magnitude of the real
parts on the one and of the imaginary parts on the other. The linear map is, with x = a + i b and w = u + i v,

    Re y = sum u a + v b,    Im y = sum v a - u b

and hence a real matrix over [a | b]: rows [u | v] above rows [v | -u], whose entries are 0 or a sign times one of the two
scales. `real` gives it as ternary codes with one scale per half, which every kernel for integers runs.

Codes: 0, 1, 2, 3 for 1, i, -1, -i; two bits per complex weight. Files hold them as the format `complex` of a real matrix whose
outputs and inputs are pairs (`formats/complex.py`).

Shape legend: N out features, K in features, both complex.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.quantize.codes import Codes
from aerogel.quantize.grids import IntGrid

SIGNS = torch.tensor([[1, 0], [0, 1], [-1, 0], [0, -1]], dtype=torch.int8)
"""Real and imaginary sign of every code."""


@dataclass(frozen=True, kw_only=True)
class ComplexCodes:
    """A weight of {1, i, -1, -i}: values_NK uint8 [N, K] in 0..3, scale_2 float32 [2] of the real and the imaginary axis."""

    values_NK: Tensor
    scale_2: Tensor

    def decode(self) -> Tensor:
        """complex64 [N, K]."""
        parts_NK2 = SIGNS.to(self.values_NK.device)[self.values_NK.long()].float() * self.scale_2
        return torch.view_as_complex(parts_NK2.contiguous())

    def real(self) -> Codes:
        """The real map [Re x | Im x] -> [Re y | Im y] as ternary codes [2 N, 2 K], one scale per half of the inputs."""
        N, K = self.values_NK.shape
        u, v = SIGNS.to(self.values_NK.device)[self.values_NK.long()].unbind(-1)
        values = torch.cat([torch.cat([u, v], 1), torch.cat([v, -u], 1)])
        scale = torch.cat([self.scale_2.expand(N, 2), self.scale_2.flip(0).expand(N, 2)])
        return Codes(values_NK=values, scale_NG=scale.contiguous(), grid=IntGrid(bits=2, group_size=K))


def quantize_complex(w_NK: Tensor) -> ComplexCodes:
    """The nearest axis of every weight, by phase as iFairy's own code decides ties, and the mean magnitude on each axis.

    Args:
        w_NK: complex [N, K].

    Raises:
        BadInput: real weights, NaN or infinity.
    """
    if not w_NK.is_complex() or not bool(torch.isfinite(torch.view_as_real(w_NK)).all()):
        raise BadInput("four-valued complex codes need finite complex weights")
    u, v = w_NK.real, w_NK.imag
    # Each sector has the diagonal that it begins with, counter-clockwise; 0 is real.
    on_real = ((v < u) & (v >= -u)) | ((v > u) & (v <= -u)) | ((u == 0) & (v == 0))
    negative = torch.where(on_real, u < 0, v < 0)
    values = (~on_real).to(torch.uint8) + 2 * negative.to(torch.uint8)

    def mean(part: Tensor, mask: Tensor) -> Tensor:
        return part.abs().float().mul(mask).sum() / mask.sum().clamp(min=1)

    return ComplexCodes(values_NK=values, scale_2=torch.stack([mean(w_NK.real, on_real), mean(w_NK.imag, ~on_real)]))
