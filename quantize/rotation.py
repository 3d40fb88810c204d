"""Weights that are rounded in a rotated basis, and inputs that are rotated to meet them.

    y = x W^T = (x R) (W R)^T,     R = D H, a random Hadamard transform in blocks of inputs (`hadamard`)

Orthonormal, so that nothing but rounding changes: codes are chosen for W R, whose values in a block are nearly normal whatever
they were, calibration's H becomes R^T H R, and the model computes x R before each product. QuaRot (Ashkboos et al. 2024, arXiv
2404.00456) and QuIP# (Tseng et al. 2024, arXiv 2402.04396) do this to whole rows and fold it into norms where that is
possible; FP4 training does it in blocks (`emulate/training.py`). Here every linear has its own, online: nothing of the model
has to be understood, and it costs log2(block) additions for each input and one launch (`kernels/hadamard`); linears that are
merged because they read the same input share one.

Stored: `input_signs` int8 [K] (D) and `input_block` int32 [1]. The signs follow from seed and K alone, so that linears which
read the same input share them and can still be merged.

Shape legend: N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.model.layer import Layer, Need, Stats, solve_together
from aerogel.quantize.codes import refuse_zeros
from aerogel.quantize.hadamard import check_block, hadamard, inverse, random_signs

if TYPE_CHECKING:
    from aerogel.pack.format import Shapes

NAMES = ("input_signs", "input_block")


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """The rotation of a weight's inputs. signs_K: int8 [K] of -1 and 1. block_1: int32 [1], inputs of a block."""

    signs_K: Tensor
    block_1: Tensor

    @staticmethod
    def shapes(K: int) -> Shapes:
        """The stored tensors by local name."""
        return {NAMES[0]: ((K,), torch.int8), NAMES[1]: ((1,), torch.int32)}

    @staticmethod
    def read(tensors: Mapping[str, Tensor]) -> Rotation | None:
        """The inverse of `tensors`; None where inputs are not rotated."""
        if NAMES[0] not in tensors:
            return None
        return Rotation(signs_K=tensors[NAMES[0]], block_1=tensors[NAMES[1]])

    def tensors(self) -> dict[str, Tensor]:
        """As they are stored, by local name."""
        return {NAMES[0]: self.signs_K, NAMES[1]: self.block_1}

    @property
    def block(self) -> int:
        """Inputs of a block."""
        return int(self.block_1)

    def check(self, N: int, K: int, name: str) -> None:
        """Raises `BadInput` unless it can be that of a weight [N, K]."""
        try:
            check_block(K, self.block)
        except BadInput as error:
            raise BadInput(f"the rotation of {name} does not fit: {error}; the file is damaged") from error
        if self.signs_K.shape != (K,) or not bool((self.signs_K.abs() == 1).all()):
            raise BadInput(f"the input_signs of {name} are not {K} signs; the file is damaged, get it again")

    @staticmethod
    def below(parts: Sequence[Rotation | None], heights: Sequence[int]) -> Rotation | None:
        """That of weights under each other; None where they have several."""
        first = parts[0]
        return first if first and all(part and first.same(part) for part in parts) else None

    def same(self, other: Rotation) -> bool:
        """Whether both rotate alike."""
        return torch.equal(self.signs_K, other.signs_K) and torch.equal(self.block_1, other.block_1)

    def of(self, x: Tensor) -> Tensor:
        """x R, in float32 and then in x's dtype."""
        return hadamard(x.float(), self.signs_K, self.block).to(x.dtype)

    def put(self, w_NK: Tensor) -> Tensor:
        """The weight in the model's own basis, W R^T. `w_NK` itself is changed."""
        return w_NK.copy_(inverse(w_NK.float(), self.signs_K, self.block))


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Whether a stage rounds in a rotated basis.

    transform: `none`; `hadamard`, random signs and a Hadamard matrix in blocks of inputs. The model rotates its inputs to
        match, at every call; only aerogel loads it.
    transform_block: inputs of a block, a power of two that divides all K of the stage.
    transform_seed: of the signs.
    """

    transform: Literal["none", "hadamard"] = "none"
    transform_block: int = 64
    transform_seed: int = 0

    def __post_init__(self) -> None:
        if self.transform != "none":
            try:
                check_block(self.transform_block, self.transform_block)
            except BadInput as error:
                raise BadInput(f"transform_block must be a power of two, found {self.transform_block}") from error


@dataclass(frozen=True, kw_only=True)
class Rotated:
    """Stage `Layer -> Layer`: `method` on the rotated weight, with the rotation beside its codes."""

    method: Any
    mix: Mix

    def __post_init__(self) -> None:
        gradients = {"fisher", "row_loss"} & frozenset(getattr(self.method, "needs", ()))
        if gradients:
            raise BadInput("gradients are of single weights, which transform mixes; write transform: none, or another clip")

    @property
    def grid(self) -> Any:
        """The method's."""
        return self.method.grid

    def on(self, grid: Any) -> Rotated:
        """The same stage on another grid."""
        return replace(self, method=replace(self.method, grid=grid))

    @property
    def needs(self) -> frozenset[Need]:
        """The method's."""
        return frozenset(getattr(self.method, "needs", ()))

    def shapes(self, N: int, K: int) -> Shapes:
        """What is stored beside the codes of a weight [N, K]. Raises `BadInput` where blocks do not fill K."""
        check_block(K, self.mix.transform_block)
        return Rotation.shapes(K)

    def __call__(self, layer: Layer) -> Layer:
        """The layer with codes and the rotation of its inputs."""
        return self.call_group((layer,))[0]

    def call_group(self, layers: Sequence[Layer]) -> list[Layer]:
        """Several layers, handed to the method together where it takes several."""
        rotations = [self._rotation(layer) for layer in layers]
        turned = [_turned(layer, rotation) for layer, rotation in zip(layers, rotations, strict=True)]
        solved = solve_together(self.method, turned)
        return [
            one.with_(weight_NK=rotation.put(one.weight_NK.clone()), sidecars=(rotation,), stats=layer.stats)
            for layer, rotation, one in zip(layers, rotations, solved, strict=True)
        ]

    def _rotation(self, layer: Layer) -> Rotation:
        refuse_zeros(layer.mask_NK, "rotated weights")
        K, block = layer.weight_NK.shape[1], self.mix.transform_block
        try:
            check_block(K, block)
        except BadInput as error:
            raise BadInput(f"{layer.name}: {error}; write another transform_block, or leave it out of the targets") from error
        signs_K = random_signs(K, torch.Generator().manual_seed(self.mix.transform_seed + K)).to(torch.int8)
        device = layer.weight_NK.device
        return Rotation(signs_K=signs_K.to(device), block_1=torch.tensor([block], dtype=torch.int32, device=device))


def _turned(layer: Layer, rotation: Rotation) -> Layer:
    """The layer in the rotated basis: W R, and moments R^T S R."""

    def both(moment_KK: Tensor | None) -> Tensor | None:
        return None if moment_KK is None else rotation.of(rotation.of(moment_KK).T).T.contiguous()

    stats = layer.stats
    if stats is not None:
        moments = both(stats.second_moment_KK), both(stats.cross_moment_KK)
        stats = Stats(
            tokens=stats.tokens, second_moment_KK=moments[0], cross_moment_KK=moments[1], peak_K=None, skipped=stats.skipped
        )
    return layer.with_(weight_NK=rotation.of(layer.weight_NK), stats=stats, mask_NK=None)
