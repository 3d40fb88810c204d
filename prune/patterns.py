"""Which weights may go: how many, and compared with which others.

A method gives every weight a score; a pattern turns scores into a mask by removing the lowest. Counts are exact: ties are
broken by position, never by chance, and weights that an earlier stage pruned go first.

    unstructured   the method's own set: the whole matrix, one output, or a run of inputs
    row            the share is met in every output
    N:M            of every M consecutive inputs of an output, N stay (2:4 is what GPUs can skip)
    RxC            blocks of R outputs by C inputs go or stay as one, judged by their summed score

Shape legend: N out features, K in features (the N of N:M is not the N of shapes).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from aerogel.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """A parsed pattern.

    kind: unstructured, row, n:m or block. sparsity: share of weights removed.
    keep, of: N and M of an N:M pattern. height, width: of a block.
    """

    kind: str
    sparsity: float
    keep: int = 0
    of: int = 0
    height: int = 0
    width: int = 0

    def check(self, name: str, N: int, K: int) -> None:
        """Raises `BadInput` naming the layer when its shape does not divide into the pattern."""
        if self.kind == "n:m" and K % self.of:
            raise BadInput(
                f"{name} has {K} inputs, which do not divide into runs of {self.of};"
                f" choose a pattern whose M divides {K}, write pattern: row, or add the layer to ignore"
            )
        if self.kind == "block" and (N % self.height or K % self.width):
            raise BadInput(
                f"{name} is {N}x{K}, which does not divide into blocks of {self.height}x{self.width};"
                " choose a block that divides both, or add the layer to ignore"
            )

    def mask(self, score_NK: Tensor, *, per_row: bool = False) -> Tensor:
        """True for the weights that stay, bool [N, K]. `per_row`: the method compares within one output."""
        N, K = score_NK.shape
        if self.kind == "n:m":
            return lowest(score_NK.reshape(-1, self.of), self.of - self.keep).logical_not_().view(N, K)
        if self.kind == "block":
            tiles = score_NK.reshape(N // self.height, self.height, K // self.width, self.width).sum((1, 3))
            keep = lowest(tiles.view(1, -1), round(self.sparsity * tiles.numel())).logical_not_().view_as(tiles)
            return keep.repeat_interleave(self.height, 0).repeat_interleave(self.width, 1)
        rows = score_NK if per_row or self.kind == "row" else score_NK.reshape(1, -1)
        return lowest(rows, round(self.sparsity * rows.shape[1])).logical_not_().view(N, K)


def parse(pattern: str, sparsity: float | None) -> Pattern:
    """The pattern that a recipe writes. `sparsity` defaults to one half, and to 1 - N/M for N:M, with which it must agree."""
    numbers = re.fullmatch(r"(\d+)([:x])(\d+)", pattern)
    if numbers is None:
        if pattern not in ("unstructured", "row"):
            raise BadInput(f"pattern must be unstructured, row, N:M such as 2:4, or RxC such as 4x1, found {pattern!r}")
        return Pattern(kind=pattern, sparsity=_share(0.5 if sparsity is None else sparsity))
    first, second = int(numbers[1]), int(numbers[3])
    if numbers[2] == "x":
        if not first or not second:
            raise BadInput(f"pattern {pattern} has an empty block; write for instance 4x1")
        return Pattern(kind="block", sparsity=_share(0.5 if sparsity is None else sparsity), height=first, width=second)
    if not 0 < first < second:
        raise BadInput(f"pattern {pattern} must keep at least one and not all of its run; write for instance 2:4")
    implied = 1 - first / second
    if sparsity is not None and abs(sparsity - implied) > 1e-6:
        raise BadInput(f"sparsity {sparsity} contradicts pattern {pattern}, which removes {implied:g}; leave sparsity out")
    return Pattern(kind="n:m", sparsity=implied, keep=first, of=second)


def lowest(score_RC: Tensor, count: int) -> Tensor:
    """True for the `count` lowest scores of each row, bool [R, C]; among equals the earlier position counts as lower."""
    chosen = torch.zeros(score_RC.shape, dtype=torch.bool, device=score_RC.device)
    if count == 0:
        return chosen
    order = torch.sort(score_RC, dim=1, stable=True).indices[:, :count]
    return chosen.scatter_(1, order, True)


def _share(sparsity: float) -> float:
    if not 0 < sparsity < 1:
        raise BadInput(f"sparsity must lie between 0 and 1, found {sparsity}")
    return sparsity
