"""Magnitude pruning: the smallest weights go. No data; the baseline of every other method.

Shape legend: N out features, K in features.
"""

from __future__ import annotations

from dataclasses import dataclass

from aerogel.model.layer import Layer, Need
from aerogel.prune.finish import check, finish, with_earlier_mask
from aerogel.prune.patterns import Pattern, parse


@dataclass(frozen=True, kw_only=True)
class Magnitude:
    """Stage `Layer -> Layer` that leaves a mask.

    sparsity: share of weights removed, one half if left out. pattern: unstructured (compared over the whole matrix),
    row, N:M or RxC. refit: fit the kept weights to the layer's output afterwards, which needs calibration; damping: share
    of the mean diagonal of H added for it.
    """

    sparsity: float | None = None
    pattern: str = "unstructured"
    refit: bool = False
    damping: float = 0.01

    def __post_init__(self) -> None:
        parse(self.pattern, self.sparsity)

    @property
    def needs(self) -> frozenset[Need]:
        """The statistics asked of calibration."""
        return frozenset({"second_moment"} if self.refit else ())

    @property
    def parsed(self) -> Pattern:
        """The pattern, parsed."""
        return parse(self.pattern, self.sparsity)

    def __call__(self, layer: Layer) -> Layer:
        """The layer with its mask. Raises `BadInput` when its shape does not fit the pattern."""
        check(layer, self.parsed, "magnitude")
        mask_NK = self.parsed.mask(with_earlier_mask(layer.weight_NK.float().abs(), layer))
        return finish(layer, layer.weight_NK.float(), mask_NK, refit=self.refit, damping=self.damping, method="magnitude")
