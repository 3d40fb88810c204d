"""{1, i, -1, -i} as a format of real matrices: pairs of outputs and inputs are the real and imaginary parts of complex ones.

    [Re y]   [ u   v ] [Re x]                with w = u + i v in s_re {1, -1} or i s_im {1, -1}
    [Im y] = [ v  -u ] [Im x]

Outputs 2 n, 2 n + 1 and inputs 2 k, 2 k + 1 belong together, and one code of two bits stands for the four weights of such a
block: half a bit per real weight. A weight has the scale of the real axis where n + k is even, else of the imaginary axis.
iFairy (arXiv 2508.05571) trains models so; rounding others to it is research: whatever in a block is not of the form above is
dropped, (u, v) being the nearest that is. `quantize/complex_codes.py` rounds the complex numbers.

Shape legend: N out features, K in features, both real and even.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.quantize.codes import Params, refuse_zeros
from aerogel.quantize.complex_codes import SIGNS, quantize_complex
from aerogel.quantize.ranges import Search, Step

REFUSAL = "a complex code ties two outputs and two inputs, so it is only rounded to: write method: rtn"


@dataclass(frozen=True, kw_only=True)
class Complex:
    """Blocks of 2 x 2 weights in {1, i, -1, -i}, with one scale for each axis; method: rtn only."""

    without_zero: ClassVar[str] = "complex codes"
    no_gradients: ClassVar[str] = "the scales of complex codes are means, which nothing weighs; write clip: mse"
    only_rounded: ClassVar[str] = REFUSAL
    """What a method says that chooses codes column by column, and so cannot take this grid."""

    @property
    def bits(self) -> int:
        """Of one code, which is four real weights."""
        return 2

    @property
    def group_size(self) -> int | None:
        """All inputs."""
        return None

    @property
    def scale_dtype(self) -> torch.dtype:
        """The scales are two numbers, in float32."""
        return torch.float32

    @property
    def shared_rows(self) -> int | None:
        """All outputs."""
        return None

    def groups(self, K: int) -> int:
        """One."""
        return 1

    def fit(
        self,
        w_NK: Tensor,
        importance_K: Tensor | None = None,
        mask_NK: Tensor | None = None,
        search: Search | str = "minmax",
        curvature_KK: Tensor | None = None,
    ) -> Params:
        """Mean magnitudes on each axis, [1, 2]; nothing is searched. Raises `BadInput` for a mask or odd sizes."""
        refuse_zeros(mask_NK, self.without_zero)
        return Params(scale_NG=quantize_complex(complex_of(w_NK)).scale_2[None])

    def encode(self, w_NK: Tensor, params: Params) -> Tensor:
        """The signs of the nearest axes, int8 [N, K] in -1, 0, 1."""
        return signs_of(quantize_complex(complex_of(w_NK)).values_NK)

    def decode(self, q_NK: Tensor, params: Params) -> Tensor:
        """sign * scale, float32 [N, K]."""
        N, K = q_NK.shape
        odd_NK = (torch.arange(N, device=q_NK.device)[:, None] + torch.arange(K, device=q_NK.device)) % 2
        return q_NK.float() * params.scale_NG[0].to(q_NK.device)[odd_NK]

    def step_of_range(self, low: Tensor, high: Tensor) -> Step:
        """There is no such thing."""
        raise BadInput(REFUSAL)

    def neighbours(self, step: Step) -> list[Step]:
        """None."""
        return []

    def store(self, scale: Tensor) -> Tensor:
        """As they are."""
        return scale

    def snap(self, w: Tensor, step: Step, out: Tensor | None = None) -> Tensor:
        """There is no such thing."""
        raise BadInput(REFUSAL)

    def rounder(self, params: Params, N: int, K: int, dtype: torch.dtype = torch.float32) -> Any:
        """There is no such thing."""
        raise BadInput(REFUSAL)

    def params(self, step: Step, N: int, K: int) -> Params:
        """There is no such thing."""
        raise BadInput(REFUSAL)


def complex_of(w_NK: Tensor) -> Tensor:
    """The nearest complex matrix [N/2, K/2] to a real one. Raises `BadInput` for odd sizes."""
    if w_NK.shape[0] % 2 or w_NK.shape[1] % 2:
        raise BadInput(f"complex codes take pairs of outputs and of inputs, found a [{w_NK.shape[0]}, {w_NK.shape[1]}] weight")
    w = w_NK.float()
    return torch.complex(w[::2, ::2] - w[1::2, 1::2], w[::2, 1::2] + w[1::2, ::2]) / 2


def signs_of(codes: Tensor) -> Tensor:
    """Codes uint8 [N/2, K/2] as the signs of the real matrix, int8 [N, K]."""
    u, v = SIGNS.to(codes.device)[codes.long()].unbind(-1)
    above, below = (torch.stack(parts, -1).flatten(1) for parts in ((u, v), (v, -u)))
    return torch.stack([above, below], 1).flatten(0, 1)


def codes_of(signs_NK: Tensor) -> Tensor:
    """The inverse of `signs_of`."""
    u, v = signs_NK[::2, ::2], signs_NK[::2, 1::2]
    return (torch.where(u != 0, 1 - u, 2 - v)).to(torch.uint8)
