"""A factor for each input of a layer: inputs are multiplied by it before anything else happens to them.

    y = W (s x),     W rounded for the inputs that it meets

AWQ (Lin et al. 2023) and SmoothQuant (Xiao et al. 2022) scale columns of W up and inputs down by the same numbers. Where the
inverse cannot be multiplied into what comes before (a norm, the linear that makes the inputs), it stays here. aerogel's own AWQ
stores none; ModelOpt's checkpoints have them as `pre_quant_scale`, a float [K].

Shape legend: N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aerogel.errors import BadInput

NAMES = ("pre_quant_scale",)


@dataclass(frozen=True, kw_only=True)
class InputFactor:
    """The factors of a weight's inputs. factor_K: float [K]."""

    factor_K: Tensor

    @staticmethod
    def read(tensors: Mapping[str, Tensor]) -> InputFactor | None:
        """From stored tensors; None where inputs come as they are."""
        found = tensors.get(NAMES[0])
        return None if found is None else InputFactor(factor_K=found)

    def tensors(self) -> dict[str, Tensor]:
        """As it is stored, by local name."""
        return {NAMES[0]: self.factor_K}

    def check(self, N: int, K: int, name: str) -> None:
        """Raises `BadInput` unless they are K positive numbers."""
        fits = self.factor_K.shape == (K,) and self.factor_K.dtype.is_floating_point
        if not fits or not bool(((self.factor_K > 0) & self.factor_K.isfinite()).all()):
            found = f"{self.factor_K.dtype} {list(self.factor_K.shape)}".removeprefix("torch.")
            raise BadInput(f"the {NAMES[0]} of {name} is {found}, not {K} positive numbers; the file is damaged, get it again")

    @staticmethod
    def below(parts: Sequence[InputFactor | None], heights: Sequence[int]) -> InputFactor | None:
        """Those of weights under each other; None where they have several."""
        first = parts[0]
        return first if first and all(part and torch.equal(part.factor_K, first.factor_K) for part in parts) else None

    def put(self, w_NK: Tensor) -> Tensor:
        """The weight that meets inputs as they are. `w_NK` itself is changed."""
        return w_NK.mul_(self.factor_K.to(w_NK.dtype))
