"""A site: one producer and the linears that read its output. What scaling methods work on.

y = W x and y = (W diag(s)) (x / s) are the same, so a scale per channel can move from the producer (a norm weight, the
rows of `up` before `down`, the rows of `v` before `o`) into its consumers at no cost. Only the rounding of W diag(s)
differs from that of W. A site stage chooses s; whoever holds the model divides the producer by it.

Shape legend: N out features, K channels that the consumers share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from aerogel.errors import RunFailed
from aerogel.model.layer import Layer, Stats
from aerogel.quantize.grids import Grid


@dataclass(frozen=True, kw_only=True)
class Site:
    """What the walk hands to a scaling method, and what it gets back.

    name: where it is, for messages, such as `model.layers.0.input_layernorm`.
    consumers: the linears that read the producer; they share one input.
    grids: for each consumer the grid it will be rounded to, None where it stays as it is.
    tie_K: int64 [K], the producer's channel that each input comes from; inputs of one channel must share a scale (value
        heads that several query heads read). None when every input has its own.
    scale_K: the chosen scale, float32 [K]; None before a method ran.
    notes: facts for the report.
    """

    name: str
    consumers: tuple[Layer, ...]
    grids: tuple[Grid | None, ...]
    tie_K: Tensor | None = None
    scale_K: Tensor | None = None
    notes: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.consumers or len(self.consumers) != len(self.grids):
            raise RunFailed(f"site {self.name} needs one grid entry for each of its {len(self.consumers)} consumers")

    def tied(self, x_K: Tensor) -> Tensor:
        """Every value replaced by the mean over the inputs that come from the same channel."""
        if self.tie_K is None:
            return x_K
        channels = int(self.tie_K.max()) + 1
        total = x_K.new_zeros(channels).index_add_(0, self.tie_K, x_K)
        count = x_K.new_zeros(channels).index_add_(0, self.tie_K, torch.ones_like(x_K))
        return (total / count)[self.tie_K]

    def scaled(self) -> tuple[Layer, ...]:
        """The consumers with the scale folded in: weights times s, statistics as if the input had been divided by s."""
        if self.scale_K is None:
            return self.consumers
        seen: dict[int, Stats] = {}
        return tuple(_scaled(layer, self.scale_K, seen) for layer in self.consumers)

    def producer_scale(self) -> Tensor | None:
        """1 / s for each channel of the producer, [channels]; multiply its output by it."""
        if self.scale_K is None:
            return None
        if self.tie_K is None:
            return 1 / self.scale_K
        inverse = self.scale_K.new_ones(int(self.tie_K.max()) + 1)
        inverse[self.tie_K] = 1 / self.scale_K
        return inverse


def _scaled(layer: Layer, scale_K: Tensor, seen: dict[int, Stats]) -> Layer:
    """`seen` keeps statistics that several layers share one object, so that a solver can share its factor too."""
    stats = layer.stats
    if stats is not None:
        key = id(stats.second_moment_KK)
        if key not in seen:
            seen[key] = scaled_stats(stats, 1 / scale_K)
        stats = seen[key]
    return layer.with_(weight_NK=layer.weight_NK * scale_K, stats=stats)


def scaled_stats(stats: Stats, factor_K: Tensor) -> Stats:
    """Statistics of the input multiplied by `factor_K`."""
    outer = factor_K[:, None] * factor_K[None, :]
    second, cross = stats.second_moment_KK, stats.cross_moment_KK
    return replace(
        stats,
        second_moment_KK=None if second is None else second * outer,
        cross_moment_KK=None if cross is None else cross * outer,
    )
