"""SparseGPT: prune input by input, and let the inputs still to come make up for what is lost.

The recursion of GPTQ with "drop or keep" in place of rounding (Frantar & Alistarh 2023, arXiv 2301.00774): dropping
weight i costs t_i^2 r_ii^2, with t_i its value after earlier drops and r_ii the pivot of the Cholesky factor of H (in the
paper's terms w^2 / [H^-1]_ii). The mask is chosen block by block as the pass reaches them, so it sees earlier updates:
of every 128 inputs over all outputs the cheapest share, of every output the cheapest (`row`), or of every M inputs of an
output the cheapest M - N. Cost: a Cholesky factor, N K^2 multiply-adds, one sort per block.

Shape legend: N out features, K in features; [K, N] is a weight transposed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.model.layer import Layer, Need
from aerogel.prune.finish import check, finish
from aerogel.prune.patterns import Pattern, parse
from aerogel.quantize.problem import ROWS, Problem, prepare, second_moment
from aerogel.quantize.sweep import BLOCK, sweep


@dataclass(frozen=True, kw_only=True)
class SparseGpt:
    """Stage `Layer -> Layer` that leaves a mask and updated weights.

    sparsity: share of weights removed, one half if left out. pattern: unstructured (compared over blocks of 128 inputs
    and all outputs), row (within a block, every output alone), or N:M. refit: solve the kept weights exactly on the
    mask afterwards. damping: share of the mean diagonal of H added to it; grows tenfold when H cannot be factored.
    """

    sparsity: float | None = None
    pattern: str = "unstructured"
    refit: bool = False
    damping: float = 0.01

    def __post_init__(self) -> None:
        if parse(self.pattern, self.sparsity).kind == "block":
            raise BadInput(f"sparsegpt has no pattern {self.pattern}; write unstructured, row or N:M, or method: wanda")
        if not 0 < self.damping <= 1:
            raise BadInput(f"damping must lie above 0 and at most at 1, found {self.damping}")

    @property
    def needs(self) -> frozenset[Need]:
        """The statistics asked of calibration."""
        return frozenset({"second_moment"})

    @property
    def parsed(self) -> Pattern:
        """The pattern, parsed."""
        return parse(self.pattern, self.sparsity)

    def __call__(self, layer: Layer) -> Layer:
        """The layer with mask and updated weights. Raises `RunFailed` where calibration saw nothing of it."""
        check(layer, self.parsed, "sparsegpt")
        moment_KK = second_moment(layer, "sparsegpt")
        problem = prepare(moment_KK, name=layer.name, damping=self.damping, act_order=False)
        weights, masks = [], []
        for start in range(0, len(layer.weight_NK), ROWS):
            rows = slice(start, start + ROWS)
            earlier = None if layer.mask_NK is None else layer.mask_NK[rows].T
            w_KN = layer.weight_NK[rows].float().T.contiguous()
            pruner = _Pruner(self.parsed, problem, earlier, torch.empty_like(w_KN, dtype=torch.bool))
            segment = self.parsed.of if self.parsed.kind == "n:m" else BLOCK
            weights.append(sweep(w_KN, w_KN, problem.lower_KK, pruner, segment=segment).T)
            masks.append(pruner.mask_KN.T)
        noted = layer.with_(notes=problem.notes)
        return finish(
            noted,
            torch.cat(weights).contiguous(),
            torch.cat(masks).contiguous(),
            refit=self.refit,
            damping=self.damping,
            method="sparsegpt",
        )


@dataclass(frozen=True)
class _Pruner:
    """Chooser that drops or keeps; fills `mask_KN` as it goes."""

    pattern: Pattern
    problem: Problem
    earlier_KN: Tensor | None
    mask_KN: Tensor

    def enter(self, start: int, stop: int, target_kN: Tensor) -> None:
        """The mask of the columns that come next, from their present values."""
        cost = target_kN.square() * self.problem.pivot_K[start:stop, None]
        if self.earlier_KN is not None:
            cost = cost.masked_fill(~self.earlier_KN[start:stop], -torch.inf)
        self.mask_KN[start:stop] = self.pattern.mask(cost.T.contiguous()).T

    def column(self, i: int, target_N: Tensor, out: Tensor) -> None:
        """Kept values as they are, zero for the others."""
        torch.mul(target_N, self.mask_KN[i], out=out)
