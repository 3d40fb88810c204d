"""GPTQ: round one input at a time and let the inputs still to come make up for the error.

Equation: minimise tr((W - Q) H (W - Q)^T) over codes, H the second moment of the layer's input. Column by column, in
the order of falling activation, each is rounded to nearest after the errors of earlier columns have been spread over it
(`sweep` has the recursion; it equals that of Frantar et al. 2022, arXiv 2210.17323, without forming H^-1).

What is added to the paper's method, each an option:
- groups: scales are fitted before the solve, or group by group when a group is due, to the weights as errors of earlier ones
  have left them (GPTQ's and ShiftAddLLM's way). Scales that many outputs share need that: they cannot follow otherwise.
- clip: scales are fitted by a range search in which an error at input k costs 1 / (H^-1)_kk, the price
  that remains after all other inputs have adapted. Scoring the clip by the inverse factor is due to Marlin's authors
  (Frantar et al. 2024, arXiv 2408.11743).
- act_order changes only the order of solving. Groups stay consecutive inputs and codes are stored in natural order, so
  no runtime pays for it.
- refit: afterwards codes and scales descend on the same loss until they stop paying (`refine`).
- gptaq: earlier layers are compressed already, so this one sees other inputs than in the dense model; the weight is
  shifted towards the dense model's outputs before it is rounded (`problem.toward_dense`), by `gptaq_alpha` of the way. Half
  of it is best or nearly so from three bits on, a quarter below (docs/accuracy.md). The layer's loss is that of rounding what
  came out: how far the shift went says what earlier layers did, not what this one costs.
- a mask is honoured inside the loop: a pruned column has q = 0 and its error moves on like any other. When the kept
  weights were refitted on the mask first, this is the joint optimum of pruning and quantizing for that mask, because
  what refitting leaves is orthogonal to everything the codes can still change.

Cost: a Cholesky factor per input (K^3 / 3), N K^2 per sweep, about 3 N K^2 per round of refit.
Shape legend: N out features, K in features, G groups; [K, N] is a weight transposed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from aerogel.errors import BadInput, RunFailed
from aerogel.model.layer import Layer, Need
from aerogel.quantize.codes import Codes, Params, rows_of, stacked
from aerogel.quantize.problem import (
    ROWS,
    Problem,
    check_weight,
    importance_of,
    prepare,
    relative_loss,
    second_moment,
    toward_dense,
)
from aerogel.quantize.ranges import Search
from aerogel.quantize.refine import OnGrid, refine
from aerogel.quantize.rounder import Rounder
from aerogel.quantize.sweep import BLOCK, Chooser, sweep

if TYPE_CHECKING:
    from aerogel.quantize.codes import Grid


@dataclass(frozen=True, kw_only=True)
class Gptq:
    """Stage `Layer -> Layer`: codes that minimise the output error on the calibration data.

    grid: the numbers to choose from.
    clip: `none` spans every weight; `mse` searches the range with the least squared error; `hessian` weighs that error
        by what the data say about each input; `fisher` by the mean squared gradient of each weight (needs gradients).
    groups: `static` fits all scales before the solve; `updated` fits each group when its turn comes, from the weights
        as they then are.
    act_order: solve the inputs with the largest activations first; with `updated` whole groups, by their sum.
    damping: share of the mean diagonal of H added to its diagonal; grows tenfold when H cannot be factored.
    precision: type of the factorisation and the solve.
    refit: rounds of descent on codes and scales after the solve; 0 leaves plain GPTQ.
    signed_scales: let symmetric scales be negative where that puts the longer side of the range to use.
    gptaq, gptaq_alpha: also make up for what compression changed in the input, to this share.
    gptaq_experts: what to do with routed experts, whose tokens differ between the two models and cannot be paired:
        `error` stops, `plain` solves them without gptaq and says so in the notes.
    """

    grid: Grid
    clip: Literal["none", "mse", "hessian", "fisher"] = "hessian"
    groups: Literal["static", "updated"] = "static"
    act_order: bool = True
    damping: float = 0.05
    precision: Literal["float32", "float64"] = "float32"
    refit: int = 2
    signed_scales: bool = True
    gptaq: bool = False
    gptaq_alpha: float = 0.5
    gptaq_experts: Literal["error", "plain"] = "error"

    def __post_init__(self) -> None:
        if self.clip == "fisher" and (reason := getattr(self.grid, "no_gradients", "")):
            raise BadInput(reason)
        if reason := getattr(self.grid, "only_rounded", ""):
            raise BadInput(reason)
        if self.groups == "updated" and (self.grid.shared_rows is None or ROWS % self.grid.shared_rows):
            raise BadInput(
                "groups: updated needs scales of one output or of a few together; write groups: static for this format"
            )
        if not 0 < self.damping <= 1:
            raise BadInput(f"damping must lie above 0 and at most at 1, found {self.damping}")
        if self.refit < 0:
            raise BadInput(f"refit must be 0 or a number of rounds, found {self.refit}")
        if not 0 < self.gptaq_alpha <= 1:
            raise BadInput(f"gptaq_alpha must lie above 0 and at most at 1, found {self.gptaq_alpha}")

    @property
    def needs(self) -> frozenset[Need]:
        """The statistics asked of calibration."""
        moments: set[Need] = {"second_moment", "cross_moment"} if self.gptaq else {"second_moment"}
        return frozenset(moments | {"fisher"} if self.clip == "fisher" else moments)

    def __call__(self, layer: Layer) -> Layer:
        """The layer with codes. Raises `RunFailed` where calibration saw nothing of it, or H cannot be factored."""
        return self.call_group((layer,))[0]

    def call_group(self, layers: Sequence[Layer]) -> list[Layer]:
        """Several layers; those whose statistics are the same tensor share one factorisation. Results do not depend
        on who else is in the group."""
        return [self._solve(layer, second_moment(layer, "gptq"), problem) for layer, problem in self._problems(layers)]

    def moved(self, layers: Sequence[Layer]) -> list[Layer]:
        """Layers with the weights that gptaq asks for, for a stage that takes something out of them before they are solved."""
        found = []
        for layer, problem in self._problems(layers):
            target_NK, notes = self._target(layer, problem)
            found.append(layer.with_(weight_NK=target_NK, notes=notes))
        return found

    def _problems(self, layers: Sequence[Layer]) -> Iterator[tuple[Layer, Problem]]:
        """Each layer with its statistics factored, once for all that share them."""
        problems: dict[int, Problem] = {}
        for layer in layers:
            h_KK = second_moment(layer, "gptq")
            check_weight(layer, "gptq")
            if id(h_KK) not in problems:
                problems[id(h_KK)] = prepare(
                    h_KK,
                    name=layer.name,
                    damping=self.damping,
                    act_order=self.act_order,
                    together=self._together(len(h_KK)),
                    importance=self.clip == "hessian",
                    precision=self.precision,
                )
            yield layer, problems[id(h_KK)]

    def _target(self, layer: Layer, problem: Problem) -> tuple[Tensor, dict[str, object]]:
        """What codes are to approach, float32 [N, K], and what the report says of it."""
        paired = layer.stats is not None and layer.stats.cross_moment_KK is not None
        if self.gptaq and (paired or self.gptaq_experts == "error"):
            return toward_dense(layer, problem, self.gptaq_alpha, "gptaq"), {}
        note = {"gptaq": "not used: a routed expert's tokens cannot be paired"} if self.gptaq else {}
        return layer.weight_NK.float(), {**note}

    def _solve(self, layer: Layer, h_KK: Tensor, problem: Problem) -> Layer:
        target_NK, notes = self._target(layer, problem)
        notes |= problem.notes
        mask_NK = layer.mask_NK
        importance = importance_of(layer, "gptq") if self.clip == "fisher" else problem.importance_K
        fitted = self.grid.fit(target_NK, importance, mask_NK, self._search)
        chunks: list[tuple[Tensor, Params]] = []
        for start in range(0, len(target_NK), ROWS):
            rows = slice(start, min(len(target_NK), start + ROWS))
            mask_KN = None if mask_NK is None else mask_NK[rows].T.to(problem.h_KK.dtype).contiguous()
            target_KN = target_NK[rows].T.to(problem.h_KK.dtype).contiguous()
            chunks.append(self._solve_rows(target_KN, mask_KN, rows_of(self.grid, fitted, rows), problem))
        codes = self._codes(chunks, fitted)
        weight_NK = codes.decode()
        loss = relative_loss(target_NK, weight_NK, h_KK)
        wanted = target_NK if layer.rows_R is not None else None
        return layer.with_(weight_NK=weight_NK, codes=codes, loss=loss, notes=notes, target_NK=wanted)

    def _together(self, K: int) -> int:
        """Inputs that are solved one behind the other: a group, where its scales are fitted when it is due."""
        return min(self.grid.group_size or K, K) if self.groups == "updated" else 1

    @property
    def _search(self) -> Search:
        return Search(kind="minmax" if self.clip == "none" else "mse", signed=self.signed_scales)

    def _solve_rows(self, target_KN: Tensor, mask_KN: Tensor | None, fitted: Params, problem: Problem) -> tuple[Tensor, Params]:
        """Codes and scales of up to `ROWS` outputs."""
        K, N = target_KN.shape
        rounder = self.grid.rounder(fitted, N, K, target_KN.dtype)
        order_K = problem.permutation
        work_KN = target_KN[order_K]
        mask_in_order = None if mask_KN is None else mask_KN[order_K]
        chooser: Chooser = OnGrid(rounder, problem.order, mask_in_order)
        segment = BLOCK
        if self.groups == "updated":
            chooser = _Updated(rounder, mask_in_order, problem, self._search, self.clip == "hessian")
            segment = rounder.size
        q_KN = torch.empty_like(target_KN)
        q_KN[order_K] = sweep(work_KN, work_KN, problem.lower_KK, chooser, segment=segment)
        if self.refit:
            q_KN = refine(target_KN, problem.h_KK, q_KN, rounder, mask_KN, self.refit)
        params = rounder.params()
        return self.grid.encode(q_KN.T.float(), params), params

    def _codes(self, chunks: Sequence[tuple[Tensor, Params]], fitted: Params) -> Codes:
        """All rows together. Scales that outputs share change only where each group's are fitted when it is due."""
        values_NK = torch.cat([values for values, _ in chunks])
        changed = self.grid.shared_rows == 1 or self.groups == "updated"
        params = stacked([params for _, params in chunks]) if changed else fitted
        if params is None:
            raise RunFailed(
                "the rows of one weight do not fit together; this is a mistake in aerogel, report it with the recipe"
            )
        return Codes.of(values_NK, params, self.grid)


@dataclass(frozen=True)
class _Updated:
    """Chooser that fits the scales of a group when its first column is due; columns and mask are in the order of solving, in
    which groups are whole."""

    rounder: Rounder
    mask_KN: Tensor | None
    problem: Problem
    search: Search
    by_hessian: bool

    def enter(self, start: int, stop: int, target_kN: Tensor) -> None:
        """Scales of the group that begins here. The curvature is what errors in it cost once later inputs adapted."""
        kept = target_kN if self.mask_KN is None else target_kN * self.mask_KN[start:stop]
        curvature = None
        if self.by_hessian:
            unit_upper = self.problem.lower_KK[start:stop, start:stop].T
            factor = unit_upper * self.problem.pivot_K[start:stop].sqrt()
            curvature = factor @ factor.T
        N, K = kept.shape[1], stop - start
        fitted = self.rounder.grid.fit(kept.T.float(), None, None, self.search, curvature)
        single = self.rounder.grid.rounder(fitted, N, K, target_kN.dtype)
        self.rounder.replace(self.rounder.group(self.problem.order[start]), single.step(0))

    def column(self, i: int, target_N: Tensor, out: Tensor) -> None:
        """The nearest grid values, zero where pruned."""
        self.rounder.column(self.problem.order[i], target_N, out)
        if self.mask_KN is not None:
            out.mul_(self.mask_KN[i])

    def at_once(self) -> None:
        """No: scales change between the groups of a sweep."""
