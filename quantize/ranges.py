"""How wide a grid should be: the search for the scales of a weight.

The widest range (min-max) rounds every weight by up to half a step. A narrower one clips a few large weights and rounds
all others more finely, and usually wins. For each group of weights this file tries ranges p * [low, high] on a grid of
shrink factors p, and keeps the one with the least

    sum_k a_k |Q(w_k) - w_k|^norm           importance a_k: 1, the mean square of input k (diagonal of H), or of each weight
    (Q(w) - w) H_gg (Q(w) - w)^T            `curvature`: the quadratic form of the group, so that errors may cancel

The choice of scale by p-norm is GPTQ's `mse` option and EasyQuant's range optimisation; scoring the clip by the curvature
follows Marlin's authors. Two refinements come after it. A symmetric integer range reaches further on its negative side
(-8..7), so a negative scale is tried too, which puts the longer side where the weights are. And given the codes c, the
best scale has a closed form, s = sum a w c / sum a c^2: alternating it with rounding is kept while it helps. Zero points one
step away are tried there too, because shrinking moves both ends of a range alike.

Cost: one pass over the weight per candidate, vectorised over all groups of a chunk; no gradients, no randomness.
Shape legend: G groups, g members of a group, n outputs; weights are [G, g, n], scales [G, n].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from aerogel.errors import BadInput


class Step(NamedTuple):
    """Scales in use while solving, as floats that broadcast over weights.

    scale: never 0, possibly negative. low, high: the range of a code relative to its zero point, q - z; both are
    tensors like `scale` where the zero point varies, else both are plain numbers. pick: the number of the table, int64 like
    `scale`, where tables are chosen per group; 0 everywhere else.
    """

    scale: Tensor
    low: Tensor | float
    high: Tensor | float
    pick: Tensor | int = 0

    def each(self, change: Callable[[Tensor], Tensor]) -> Step:
        """The same scales with every tensor changed alike: sliced, unsqueezed, cast."""
        return Step._make(change(x) if isinstance(x, Tensor) else x for x in self)

    @staticmethod
    def join(parts: Sequence[Step], how: Callable[[list[Tensor]], Tensor]) -> Step:
        """Several scales as one: `how` puts tensors together, plain numbers are the same in all parts."""
        fields = zip(*parts, strict=True)
        return Step._make(how(list(x)) if isinstance(x[0], Tensor) else x[0] for x in fields)

    def where(self, wins: Tensor, other: Step) -> Step:
        """`other` where `wins`, else these."""
        pairs = zip(self, other, strict=True)
        return Step._make(torch.where(wins, b, a) if isinstance(a, Tensor) else a for a, b in pairs)


@dataclass(frozen=True, kw_only=True)
class Search:
    """How scales are fitted.

    kind: `minmax` spans every weight; `mse` tries narrower ranges.
    steps: number of ranges tried, from the full one down to `shrink` of it.
    norm: the power of the error that is summed; 2 except in experiments (GPTQ's own search uses 2.4).
    signed: also try negative scales where the grid is symmetric and reaches further to one side.
    refits: rounds after the search, each of other zero points and of the closed-form scale given the codes.
    """

    kind: Literal["minmax", "mse"] = "mse"
    steps: int = 24
    shrink: float = 0.5
    norm: float = 2.0
    signed: bool = True
    refits: int = 2

    def __post_init__(self) -> None:
        if self.kind not in ("minmax", "mse"):
            raise BadInput(f"search must be minmax or mse, found {self.kind!r}")
        if self.steps < 1 or not 0 < self.shrink <= 1 or self.norm <= 0 or self.refits < 0:
            raise BadInput(f"search needs steps >= 1, 0 < shrink <= 1, norm > 0, refits >= 0, found {self}")

    @staticmethod
    def of(how: Search | str) -> Search:
        """A search by name (`minmax`, `mse`) or as it is."""
        return how if isinstance(how, Search) else Search(kind=how)  # type: ignore[arg-type]


def curvature_blocks(h_KK: Tensor, size: int) -> Tensor:
    """The diagonal blocks of H, [G, size, size]; the last one padded with zeros."""
    K = h_KK.shape[0]
    groups = -(-K // size)
    blocks = h_KK.new_zeros(groups, size, size)
    for g in range(groups):
        start, stop = g * size, min(K, (g + 1) * size)
        blocks[g, : stop - start, : stop - start] = h_KK[start:stop, start:stop]
    return blocks


class Scales(Protocol):
    """What the search asks of a grid; see `codes.Grid`."""

    def step_of_range(self, low: Tensor, high: Tensor) -> Step:
        """Scales whose grid spans [low, high], rounded as they are stored."""

    def neighbours(self, step: Step) -> list[Step]:
        """Other scales near these that are worth a try."""

    def store(self, scale: Tensor) -> Tensor:
        """Scales rounded to what can be stored."""

    def snap(self, w: Tensor, step: Step, out: Tensor | None = None) -> Tensor:
        """The nearest values of the grid."""


def search_steps(
    w_Ggn: Tensor,
    grid: Scales,
    how: Search,
    weight_Ggn: Tensor | None = None,
    curvature_Ggg: Tensor | None = None,
) -> Step:
    """The best scales found, [G, n]. `curvature_Ggg` takes the place of `weight_Ggn` when both are given."""
    low, high = w_Ggn.amin(1).clamp_(max=0), w_Ggn.amax(1).clamp_(min=0)
    best = grid.step_of_range(low, high)
    if how.kind == "minmax":
        return best
    judge = _Judge(w_Ggn, grid, how, weight_Ggn, curvature_Ggg)
    cost = judge(best)
    for shrink in torch.linspace(1, how.shrink, how.steps).tolist():
        for candidate in _candidates(grid.step_of_range(low * shrink, high * shrink), how.signed):
            best, cost = _better(best, cost, candidate, judge(candidate))
    for _ in range(how.refits):
        for candidate in grid.neighbours(best):
            best, cost = _better(best, cost, candidate, judge(candidate))
        candidate = best._replace(scale=grid.store(judge.least_squares(best)))
        best, cost = _better(best, cost, candidate, judge(candidate))
    return best


def group_cost(
    w_Ggn: Tensor,
    grid: Scales,
    how: Search,
    step: Step,
    weight_Ggn: Tensor | None = None,
    curvature_Ggg: Tensor | None = None,
) -> Tensor:
    """What the search minimises, for given scales, [G, n]."""
    return _Judge(w_Ggn, grid, how, weight_Ggn, curvature_Ggg)(step)


def _candidates(step: Step, signed: bool) -> list[Step]:
    """The range itself and, where the two sides of a symmetric grid differ, its mirror image."""
    lopsided = not isinstance(step.low, Tensor) and step.low != -step.high
    return [step, step._replace(scale=-step.scale)] if signed and lopsided else [step]


def _better(old: Step, old_cost: Tensor, new: Step, new_cost: Tensor) -> tuple[Step, Tensor]:
    """Group by group the cheaper of two; the older one wins ties, so the result does not depend on later candidates."""
    wins = new_cost < old_cost
    return old.where(wins, new), torch.where(wins, new_cost, old_cost)


class _Judge:
    """Cost of candidate scales on one chunk of weights; owns the work buffers."""

    def __init__(
        self, w_Ggn: Tensor, grid: Scales, how: Search, weight_Ggn: Tensor | None, curvature_Ggg: Tensor | None
    ) -> None:
        self.w, self.grid, self.norm = w_Ggn, grid, how.norm
        self.weight, self.curvature = weight_Ggn, curvature_Ggg
        self.buffer = torch.empty_like(w_Ggn)

    def __call__(self, step: Step) -> Tensor:
        error = self._snap(step).sub_(self.w)
        if self.curvature is not None:
            return torch.einsum("Ggn,Ggn->Gn", torch.bmm(self.curvature, error), error)
        powers = error.square_() if self.norm == 2 else error.abs_().pow_(self.norm)
        if self.weight is None:
            return powers.sum(1)
        if self.weight.shape[2] > 1:
            return powers.mul_(self.weight).sum(1)
        return torch.bmm(self.weight.transpose(1, 2), powers)[:, 0]

    def least_squares(self, step: Step) -> Tensor:
        """The scale that fits the present codes best, [G, n]; 0 where all codes are 0 is stored as 1."""
        units = self._snap(step).div_(step.scale[:, None])
        if self.curvature is not None:
            pull = torch.bmm(self.curvature, units)
        else:
            pull = units if self.weight is None else units * self.weight
        stiffness = (pull * units).sum(1)
        return torch.where(stiffness > 0, (pull * self.w).sum(1) / stiffness, step.scale)

    def _snap(self, step: Step) -> Tensor:
        return self.grid.snap(self.w, step.each(lambda x: x[:, None]), self.buffer)
