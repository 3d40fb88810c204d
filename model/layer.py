"""What flows through the stages: one linear's weight, what calibration knows about its input, and what became of it.

Shape legend: N out features, K in features, G groups along K, T tokens.

Everything here is frozen. A stage (`Layer -> Layer`) returns a new `Layer`, so it can be tested on a random 8x16 matrix
with no model at hand, and two stages compose by being called one after the other: pruning leaves a mask, and whoever
rounds afterwards honours it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from aerogel.pack.format import Format
    from aerogel.quantize.grids import Codes
    from aerogel.quantize.sidecars import Sidecar

Need = Literal["second_moment", "cross_moment", "row_loss", "fisher"]
"""What a stage asks calibration for; the walk accumulates only what some stage of that layer declares in `needs`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Sums over the calibration tokens that reached one linear. Raw sums, so that `+` merges two captures exactly.

    tokens: how many tokens were seen (T).
    second_moment_KK: sum of x x^T over tokens, float32 [K, K], or None when no stage needs it.
    cross_moment_KK: sum of (x_dense - x) x^T, float32 [K, K]; x_dense is the input that the uncompressed model would
        have given. GPTAQ's mismatch term; None unless a stage needs it.
    peak_K: largest |x| of each input, float32 [K], beside every second moment.
    skipped: tokens left out because a value was not finite.
    """

    tokens: int
    second_moment_KK: Tensor | None = None
    cross_moment_KK: Tensor | None = None
    peak_K: Tensor | None = None
    skipped: int = 0

    def __add__(self, other: Stats) -> Stats:
        def merged(a: Tensor | None, b: Tensor | None, how: Callable[[Tensor, Tensor], Tensor] = torch.add) -> Tensor | None:
            return how(a, b) if a is not None and b is not None else a if b is None else b

        return Stats(
            tokens=self.tokens + other.tokens,
            second_moment_KK=merged(self.second_moment_KK, other.second_moment_KK),
            cross_moment_KK=merged(self.cross_moment_KK, other.cross_moment_KK),
            peak_K=merged(self.peak_K, other.peak_K, torch.maximum),
            skipped=self.skipped + other.skipped,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One linear, `y_MN = x_MK @ weight_NK.T`, on its way through the stages.

    name: its name in the checkpoint without the trailing `.weight`, for instance `model.layers.0.mlp.down_proj`.
    weight_NK: float32 [N, K], always the weight as it now stands: dense, masked, or decoded from `codes`.
    stats: what calibration accumulated for its input, or None for methods that need no data.
    mask_NK: bool [N, K], True where the weight is kept; None when nothing was pruned. Zeros under the mask stay zero.
    codes: the quantized weight, whose `decode()` equals `weight_NK`, sidecars apart; None when not quantized.
    sidecars: weights that are kept beside the codes.
    rows_R: int64 [R], the rows that are to get more bits; None where nobody chose.
    fisher_NK: mean squared gradient of each weight, float32 [N, K]; None unless a stage needs it.
    target_NK: what the codes were to approach where the method moved it from `weight_NK` and rows get more bits; else None.
    tokens: how many calibration tokens its input was seen with; 0 without data. Set when the statistics are let go.
    loss: relative output error tr(D H D^T) / tr(W H W^T) of this layer, or None: against the weight it came with, or what
        gptaq made of it.
    notes: facts for the report, such as {"damping": 0.01, "retries": 0}. Plain JSON values only.
    """

    name: str
    weight_NK: Tensor
    stats: Stats | None = None
    mask_NK: Tensor | None = None
    codes: Codes | None = None
    sidecars: tuple[Sidecar, ...] = ()
    rows_R: Tensor | None = None
    fisher_NK: Tensor | None = None
    target_NK: Tensor | None = None
    tokens: int = 0
    loss: float | None = None
    notes: Mapping[str, object] = field(default_factory=dict)

    def tensors(self, form: type[Format]) -> dict[str, Tensor]:
        """What is stored for codes and sidecars, by local name; nothing when there are no codes."""
        local = {} if self.codes is None else form.encode(self.codes)
        for sidecar in self.sidecars:
            local = {**local, **sidecar.tensors()}
        return local

    def with_(self, **changes: object) -> Layer:
        """A copy with `changes` applied; `notes` are merged instead of replaced."""
        if "notes" in changes:
            changes["notes"] = {**self.notes, **changes["notes"]}  # type: ignore[dict-item]
        return replace(self, **changes)  # type: ignore[arg-type]


def solve_together(method: Any, layers: Sequence[Layer]) -> list[Layer]:
    """What a stage makes of several layers: in one call where it takes several (`call_group`), else one after the other."""
    many = getattr(method, "call_group", None)
    return list(many(layers)) if many is not None and layers else [method(layer) for layer in layers]
