"""Wanda: a weight matters as much as what it carries, its size times the size of its input.

Score |w_nk| * sqrt(mean x_k^2), compared within each output (Sun et al. 2023, arXiv 2306.11695). No weight is changed
unless `refit` is asked for. Cost: one sort per output.

Shape legend: N out features, K in features.
"""

from __future__ import annotations

from dataclasses import dataclass

from aerogel.model.layer import Layer, Need
from aerogel.prune.finish import check, finish, with_earlier_mask
from aerogel.prune.patterns import Pattern, parse
from aerogel.quantize.problem import second_moment


@dataclass(frozen=True, kw_only=True)
class Wanda:
    """Stage `Layer -> Layer` that leaves a mask.

    sparsity: share of weights removed, one half if left out. pattern: unstructured (compared within each output), row
    (the same), N:M or RxC. refit: fit the kept weights to the layer's output afterwards; damping: share of the mean
    diagonal of H added for it.
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
        return frozenset({"second_moment"})

    @property
    def parsed(self) -> Pattern:
        """The pattern, parsed."""
        return parse(self.pattern, self.sparsity)

    def __call__(self, layer: Layer) -> Layer:
        """The layer with its mask. Raises `RunFailed` where calibration saw nothing of it."""
        check(layer, self.parsed, "wanda")
        size_K = second_moment(layer, "wanda").diagonal().sqrt()
        score_NK = with_earlier_mask(layer.weight_NK.float().abs() * size_K, layer)
        mask_NK = self.parsed.mask(score_NK, per_row=True)
        return finish(layer, layer.weight_NK.float(), mask_NK, refit=self.refit, damping=self.damping, method="wanda")
