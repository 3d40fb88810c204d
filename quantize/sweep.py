"""One pass over the columns of a weight, each chosen in the light of the errors made before it.

GPTQ, SparseGPT and coordinate descent differ only in three inputs of the same recursion. With columns i = 0 .. K-1,

    t_i = base_i + sum_{j<i} L_ij d_j        what column i should be now
    q_i = choose(t_i)                        rounded, or masked, or both
    d_i = reference_i - q_i                  the error that later columns will see

GPTQ:    H = R R^T with R upper triangular, and tr(D H D^T) = |D R|^2. Column i of D R is r_ii (d_i + sum_{j<i} d_j R_ji /
         r_ii): the best q_i given the earlier ones is t_i rounded, with L_ij = R_ji / r_ii and base = reference = W. This
         equals the published recursion (which updates all later columns with the Cholesky factor of H^-1) and needs no
         inverse. SparseGPT is the same with `choose` = keep or drop, at a cost of t_i^2 r_ii^2.
Descent: q_i is optimal given *all* other columns when it is q_i + (H d)_i / H_ii rounded: L_ij = H_ij / H_ii, reference =
         the present q, base = q + (H d) / diag H.

Everything is [K, N], so a column is one contiguous run. Sums over earlier columns are taken when a column is due
(left-looking), block by block: a matrix product for blocks of 128 and 32 columns, a matrix-vector product inside.
Cost: N K^2 multiply-adds and about six small operations per column; on a GPU one launch per 32 columns where the chooser
has it (`kernels/rounding`).

Shape legend: N out features, K in features; X_KN is a weight transposed; L is [K, K], rows are read left of the diagonal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from aerogel.kernels.rounding.columns import Columns

BLOCK = 128
INNER = 32


class Chooser(Protocol):
    """What decides a column."""

    def enter(self, start: int, stop: int, target_kN: Tensor) -> None:
        """Columns start..stop come next; `target_kN` is what they should be, as far as columns before `start` say."""

    def column(self, i: int, target_N: Tensor, out: Tensor) -> None:
        """Write the chosen values of column i to `out`."""

    def at_once(self) -> Columns | None:
        """What decides whole runs of columns in place of `column`, if there is such a thing here."""


def sweep(base_KN: Tensor, reference_KN: Tensor, lower_KK: Tensor, chooser: Chooser, *, segment: int = BLOCK) -> Tensor:
    """The chosen values, [K, N].

    segment: `chooser.enter` is called for every run of so many columns, when all feedback from before it is in.
    Bitwise the same for a row whatever other rows stand beside it as long as N stays the same.
    """
    state = _State(base_KN.clone(), reference_KN, lower_KK, chooser, segment)
    state.run(0, base_KN.shape[0], _levels(segment))
    return state.chosen


def _levels(segment: int) -> tuple[int, ...]:
    """Nested block sizes, outermost first; segments fit into the level above them."""
    if segment > BLOCK:
        return (segment, BLOCK, INNER)
    outer = segment * (BLOCK // segment)
    return tuple(dict.fromkeys((outer, segment) if segment <= INNER else (outer, segment, INNER)))


class _State:
    """The arrays of one pass."""

    def __init__(self, target: Tensor, reference: Tensor, lower: Tensor, chooser: Chooser, segment: int) -> None:
        self.target, self.reference, self.lower = target, reference, lower
        self.chooser, self.segment = chooser, segment
        self.at_once = chooser.at_once()
        self.chosen = torch.empty_like(target)
        self.error = torch.empty_like(target)

    def run(self, start: int, stop: int, levels: tuple[int, ...]) -> None:
        """Decide columns start..stop, whose targets hold all feedback from before `start`."""
        if not levels:
            return self._columns(start, stop)
        size, *rest = levels
        for first in range(start, stop, size):
            last = min(stop, first + size)
            if first > start:
                self.target[first:last].addmm_(self.lower[first:last, start:first], self.error[start:first])
            if size == self.segment:
                self.chooser.enter(first, last, self.target[first:last])
            self.run(first, last, tuple(rest))
        return None

    def _columns(self, start: int, stop: int) -> None:
        if self.at_once is not None:
            return self.at_once(start, stop, self.target, self.reference, self.lower, self.chosen, self.error)
        for i in range(start, stop):
            target_N, chosen_N = self.target[i], self.chosen[i]
            if i > start:
                target_N.addmv_(self.error[start:i].T, self.lower[i, start:i])
            self.chooser.column(i, target_N, chosen_N)
            torch.sub(self.reference[i], chosen_N, out=self.error[i])
        return None
