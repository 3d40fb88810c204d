"""One scale for all inputs of a layer, found once by calibration: static rounding of activations.

    x' = s * round(x / s)      int8: s = peak / 127        fp8: s = peak / 448, rounded to e4m3

with peak the largest |x| that calibration saw. Nothing is looked for at run time, which saves a pass over the inputs, and other
tools' checkpoints have it (compressed-tensors with `dynamic: false`, ModelOpt's FP8). What exceeds the peak is cut off, and
every token shares the unit of the loudest one, so that a scale per token (`int8`, `fp8`) loses less.

Stored: `input_scale` float32 [1]. Layers that read the same input have the same scale.

Shape legend: N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aerogel.errors import BadInput, RunFailed
from aerogel.model.layer import Layer, Need, solve_together
from aerogel.quantize.columns import Columns

if TYPE_CHECKING:
    from aerogel.pack.format import Shapes

NAMES = ("input_scale",)
LARGEST = {"int8-static": 127.0, "fp8-static": 448.0}
"""The largest code, by what a recipe calls the rounding."""


@dataclass(frozen=True, kw_only=True)
class InputScale:
    """The unit of a layer's rounded inputs. scale_1: float32 [1]."""

    scale_1: Tensor

    @staticmethod
    def shapes() -> Shapes:
        """The stored tensor by local name."""
        return {NAMES[0]: ((1,), torch.float32)}

    @staticmethod
    def read(tensors: Mapping[str, Tensor]) -> InputScale | None:
        """From stored tensors, where other tools have no axes or other types of float; None where there is no such scale."""
        found = tensors.get(NAMES[0])
        return None if found is None else InputScale(scale_1=found.reshape(-1).float())

    def tensors(self) -> dict[str, Tensor]:
        """As it is stored, by local name."""
        return {NAMES[0]: self.scale_1}

    def check(self, N: int, K: int, name: str) -> None:
        """Raises `BadInput` unless it is one positive number."""
        if self.scale_1.shape != (1,) or not bool((self.scale_1 > 0) & self.scale_1.isfinite()):
            raise BadInput(
                f"the input_scale of {name} is {self.scale_1.tolist()}, not one positive number; the file is damaged"
            )

    @staticmethod
    def below(parts: Sequence[InputScale | None], heights: Sequence[int]) -> InputScale | None:
        """That of weights under each other, of so many rows each; None where they have several."""
        first = parts[0]
        return first if all(one and first and torch.equal(one.scale_1, first.scale_1) for one in parts) else None

    def put(self, w_NK: Tensor) -> Tensor:
        """`w_NK` as it is: no weight is kept here."""
        return w_NK


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Stage `Layer -> Layer`: `method`, and the scale of the inputs beside what it makes. activations: a key of `LARGEST`."""

    method: Any
    activations: str

    @property
    def grid(self) -> Any:
        """The method's."""
        return self.method.grid

    def on(self, grid: Any) -> Measured:
        """The same stage on another grid."""
        inner = self.method
        return replace(self, method=inner.on(grid) if hasattr(inner, "on") else replace(inner, grid=grid))

    @property
    def needs(self) -> frozenset[Need]:
        """The method's, and the peaks, which are taken where second moments are."""
        own: frozenset[Need] = frozenset({"second_moment"})
        return own | frozenset(getattr(self.method, "needs", ()))

    def shapes(self, N: int, K: int) -> Shapes:
        """What is stored beside the codes of a weight [N, K]."""
        inner: Shapes = self.method.shapes(N, K) if hasattr(self.method, "shapes") else {}
        return inner | InputScale.shapes()

    def __call__(self, layer: Layer) -> Layer:
        """The layer with codes and the scale of its inputs."""
        return self.call_group((layer,))[0]

    def call_group(self, layers: Sequence[Layer]) -> list[Layer]:
        """Several layers, handed to the method together where it takes several."""
        solved = solve_together(self.method, layers)
        return [
            one.with_(sidecars=(*one.sidecars, self.measure(layer, one.sidecars)))
            for layer, one in zip(layers, solved, strict=True)
        ]

    def measure(self, layer: Layer, beside: Sequence[object] = ()) -> InputScale:
        """From the peaks of those inputs that will be rounded: columns kept `beside` the codes are not, nor what exceeds a
        threshold at run time. Raises `RunFailed` without any."""
        peak_K = None if layer.stats is None else layer.stats.peak_K
        if peak_K is None:
            raise RunFailed(f"activations: {self.activations} needs the peaks of the inputs of {layer.name}; none were kept")
        for columns in (held for held in beside if isinstance(held, Columns)):
            peak_K = peak_K.index_fill(0, columns.index_C.long(), 0)
            peak_K = torch.where(columns.threshold_1 > 0, peak_K.minimum(columns.threshold_1), peak_K)
        peak = peak_K.max().float()
        return InputScale(scale_1=torch.where(peak > 0, peak / LARGEST[self.activations], 1.0).reshape(1))
