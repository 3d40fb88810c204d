"""SparseGPT: prune input by input, and let the inputs still to come make up for what is lost.

The recursion of GPTQ with "drop or keep" in place of rounding (Frantar & Alistarh 2023, arXiv 2301.00774): dropping
weight i costs t_i^2 r_ii^2, with t_i its value after earlier drops and r_ii the pivot of the Cholesky factor of H (in the
paper's terms w^2 / [H^-1]_ii). The mask is chosen block by block as the pass reaches them, so it sees earlier updates:
of every 32 inputs over all outputs the cheapest, of every 128 inputs of an output the cheapest share (`row`), or of every
M inputs of an output the cheapest M - N. Cost: a Cholesky factor, N K^2 multiply-adds, one sort per block.

Two things go beyond the paper. Inputs with the largest activations come first, as in GPTQ's act_order, so that what is
lost there is made up for by all others (the runs of an N:M pattern move as one). And `unstructured` does not take the
same share from every block: each gives up as many weights as it has among the cheapest of the whole matrix, and which
ones is decided when the pass reaches it. Both matter together: ordered blocks differ too much for equal shares.

Shape legend: N out features, K in features; [K, N] is a weight transposed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.model.layer import Layer, Need
from aerogel.prune.finish import check, finish
from aerogel.prune.patterns import Pattern, lowest, parse
from aerogel.quantize.problem import ROWS, Problem, prepare, second_moment
from aerogel.quantize.sweep import BLOCK, sweep

RUN = 32
"""Inputs whose mask is chosen at a time without a pattern. Small, so that choices see most of the updates: 0.71 against
0.74 nats at 128 (docs/LOG.md)."""


@dataclass(frozen=True, kw_only=True)
class SparseGpt:
    """Stage `Layer -> Layer` that leaves a mask and updated weights.

    sparsity: share of weights removed, one half if left out. pattern: unstructured (compared over all outputs), row (every
    output alone), or N:M. refit: solve the kept weights exactly on the mask afterwards. act_order: the inputs with the
    largest activations first. damping: share of the mean diagonal of H added to it; grows tenfold when H cannot be factored.
    """

    sparsity: float | None = None
    pattern: str = "unstructured"
    refit: bool = False
    act_order: bool = True
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
        pattern = self.parsed
        check(layer, pattern, "sparsegpt")
        moment_KK = second_moment(layer, "sparsegpt")
        run = pattern.of if pattern.kind == "n:m" else 1
        problem = prepare(moment_KK, name=layer.name, damping=self.damping, act_order=self.act_order, together=run)
        order_K = problem.permutation
        weight_NK = torch.empty_like(layer.weight_NK, dtype=torch.float32)
        mask_NK = torch.empty_like(layer.weight_NK, dtype=torch.bool)
        for start in range(0, len(weight_NK), ROWS):
            rows = slice(start, start + ROWS)
            earlier_KN = None if layer.mask_NK is None else layer.mask_NK[rows].T[order_K]
            w_KN = layer.weight_NK[rows].float().T[order_K].contiguous()
            quota = _quota(w_KN, earlier_KN, problem, pattern) if pattern.kind == "unstructured" else ()
            pruner = _Pruner(pattern, problem, earlier_KN, quota, torch.empty_like(w_KN, dtype=torch.bool))
            segment = {"n:m": run, "row": BLOCK}.get(pattern.kind, RUN)
            weight_NK[rows, order_K] = sweep(w_KN, w_KN, problem.lower_KK, pruner, segment=segment).T
            mask_NK[rows, order_K] = pruner.mask_KN.T
        noted = layer.with_(notes=problem.notes)
        return finish(noted, weight_NK, mask_NK, refit=self.refit, damping=self.damping, method="sparsegpt")


def _cost(target_kN: Tensor, pivot_k: Tensor, earlier_kN: Tensor | None) -> Tensor:
    """What dropping each weight costs, [k, N]; those that an earlier stage dropped come lowest."""
    cost = target_kN.square() * pivot_k[:, None]
    return cost if earlier_kN is None else cost.masked_fill(~earlier_kN, -torch.inf)


def _quota(w_KN: Tensor, earlier_KN: Tensor | None, problem: Problem, pattern: Pattern) -> tuple[int, ...]:
    """How many weights of each input are among the cheapest of the matrix as it stands before the pass, [K]."""
    cost = _cost(w_KN, problem.pivot_K, earlier_KN)
    gone = lowest(cost.reshape(1, -1), round(pattern.sparsity * cost.numel())).view_as(cost)
    return tuple(gone.sum(1).tolist())


@dataclass(frozen=True)
class _Pruner:
    """Chooser that drops or keeps; fills `mask_KN` as it goes. Columns in the order of the solve."""

    pattern: Pattern
    problem: Problem
    earlier_KN: Tensor | None
    quota: tuple[int, ...]
    mask_KN: Tensor

    def enter(self, start: int, stop: int, target_kN: Tensor) -> None:
        """The mask of the columns that come next, from their present values."""
        earlier = None if self.earlier_KN is None else self.earlier_KN[start:stop]
        cost = _cost(target_kN, self.problem.pivot_K[start:stop], earlier)
        if self.pattern.kind == "unstructured":
            gone = lowest(cost.reshape(1, -1), sum(self.quota[start:stop]))
            self.mask_KN[start:stop] = gone.logical_not_().view_as(cost)
        else:
            self.mask_KN[start:stop] = self.pattern.mask(cost.T.contiguous()).T

    def column(self, i: int, target_N: Tensor, out: Tensor) -> None:
        """Kept values as they are, zero for the others."""
        torch.mul(target_N, self.mask_KN[i], out=out)

    def at_once(self) -> None:
        """No: what is kept is decided as columns come."""
