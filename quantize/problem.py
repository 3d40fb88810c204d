"""What the input of a layer makes of an error in its weight: the quadratic form that every solver here minimises.

For a weight error D = W - Q and inputs x, the squared output error summed over the calibration tokens is tr(D H D^T) with
H = sum x x^T. `Problem` prepares H once for all linears that read the same input (q, k, v; gate and up; all of them are
independent rows of one problem): it adds damping, chooses the order of columns and factors. Numbers are relative to the
mean diagonal, so that neither the token count nor the scale of the activations matters.

Damping adds a multiple of the mean diagonal to the diagonal: without it H of few tokens is singular, and solvers would
trust correlations that calibration saw by chance. If the factorisation fails the damping is multiplied by ten, at most to
1, and the damping that worked and the number of retries are stated in the notes of the layer.
An input that was zero on every token is `dead`: its column cannot be judged and is rounded to nearest.

Shape legend: N out features, K in features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from aerogel.errors import RunFailed
from aerogel.model.layer import Layer
from aerogel.model.precision import coarse_products

ROWS = 2048
"""Outputs solved at a time: rows are independent, and this bounds the working memory."""

HIGHEST_DAMPING = 1.0

PANEL = 512
"""Columns of a K x K product made at a time where half of it need not be computed."""


def second_moment(layer: Layer, method: str) -> Tensor:
    """The layer's H, [K, K]. Raises `RunFailed` naming the layer when calibration cannot have produced a useful one."""
    stats = layer.stats
    if stats is None or stats.second_moment_KK is None:
        raise RunFailed(f"{method} needs the second moment of the inputs of {layer.name}, and calibration kept none")
    h_KK = stats.second_moment_KK
    K = layer.weight_NK.shape[1]
    if h_KK.shape != (K, K):
        raise RunFailed(f"{layer.name} has {K} inputs, but its second moment is {list(h_KK.shape)}")
    if not bool(torch.isfinite(h_KK).all()):
        raise RunFailed(f"the second moment of the inputs of {layer.name} is not finite; calibrate on other data")
    if stats.tokens == 0 or not bool((h_KK.diagonal() > 0).any()):
        raise RunFailed(
            f"{layer.name} saw no input in {stats.tokens} calibration tokens, so {method} cannot judge its weights;"
            " use more or other calibration data, or leave it to a method that needs none"
        )
    return h_KK


def importance_of(layer: Layer, method: str) -> Tensor:
    """The layer's Fisher diagonal as weights of errors, float32 [N, K]: zero nowhere, so that no weight is free.

    Raises `RunFailed` naming the layer when there is none, or it is zero everywhere."""
    fisher_NK = layer.fisher_NK
    if fisher_NK is None:
        raise RunFailed(f"{method} with clip: fisher needs gradients of {layer.name}, and there are none")
    mean = float(fisher_NK.mean())
    if not 0 < mean < float("inf"):
        raise RunFailed(f"the loss does not depend on {layer.name}; leave it to clip: hessian")
    return fisher_NK.float().clamp(min=1e-4 * mean)


def check_weight(layer: Layer, method: str) -> None:
    """Raises `RunFailed` when the weight has values that no method can round or rank."""
    if not bool(torch.isfinite(layer.weight_NK).all()):
        raise RunFailed(f"{method} cannot treat {layer.name}: its weight has NaN or infinite values")


def relative_loss(w_NK: Tensor, q_NK: Tensor, h_KK: Tensor) -> float:
    """tr(D H D^T) / tr(W H W^T) with D = W - Q, summed in float64; 0 for a weight whose output is zero anyway.

    It is reported and decides nothing, so its products may be as coarse as the machine likes: an error of about 1e-4.
    """
    error = scale = 0.0
    with coarse_products():
        for w, q in zip(torch.split(w_NK, ROWS), torch.split(q_NK, ROWS), strict=True):
            w = w.float()
            error += _quadratic(w - q, h_KK)
            scale += _quadratic(w, h_KK)
    return max(error, 0.0) / scale if scale > 0 else 0.0


def _quadratic(d_NK: Tensor, h_KK: Tensor) -> float:
    """tr(D H D^T) of a symmetric H from its upper triangle, which is half of the work."""
    total = 0.0
    for start in range(0, len(h_KK), PANEL):
        panel = slice(start, start + PANEL)
        pull = d_NK[:, panel] @ h_KK[panel, panel]
        pull.addmm_(d_NK[:, :start], h_KK[:start, panel], alpha=2)
        total += float(pull.mul_(d_NK[:, panel]).sum(dtype=torch.float64))
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """H made ready for solving.

    h_KK: damped, mean diagonal about 1, natural column order.
    order: the columns in the order in which they are solved.
    lower_KK: feedback matrix L of `sweep`, in that order. pivot_K: r_ii^2, what a unit error of column i costs once all
        later columns have adapted to it.
    importance_K: 1 / diag(H^-1), natural order: what a unit error costs once *all* other columns have adapted; None unless
        asked for, since it takes about as long as the factor itself.
    notes: damping, retries, dead columns.
    """

    h_KK: Tensor
    order: tuple[int, ...]
    lower_KK: Tensor
    pivot_K: Tensor
    importance_K: Tensor | None
    notes: dict[str, object]

    @property
    def permutation(self) -> Tensor:
        """`order` as a tensor."""
        return torch.tensor(self.order, device=self.h_KK.device)


def prepare(
    h_KK: Tensor,
    *,
    name: str,
    damping: float,
    act_order: bool,
    together: int = 1,
    importance: bool = False,
    precision: Literal["float32", "float64"] = "float32",
) -> Problem:
    """Damp, order and factor a second moment. `name` is who to name if it cannot be factored (`RunFailed`).

    act_order: columns with the largest mean square first, so that their errors are still corrected by all others.
    together: runs of so many neighbours stay together and in their order, sorted by their summed mean square; a shorter last
        one is solved last.
    importance: also compute `importance_K`.
    """
    h_KK = h_KK.to(torch.float64 if precision == "float64" else torch.float32)
    dead = h_KK.diagonal() <= 0
    unit = h_KK.diagonal()[~dead].mean()
    order = torch.arange(len(h_KK), device=h_KK.device)
    if act_order:
        whole = len(h_KK) // together * together
        runs = h_KK.diagonal()[:whole].view(-1, together).sum(1)
        first = order[:whole].view(-1, together)[torch.argsort(runs, descending=True, stable=True)].flatten()
        order = torch.cat([first, order[whole:]])
    upper, used, retries = _factor(h_KK, unit, order, damping, name)
    diagonal = upper.diagonal().clone()
    importance_K = None
    if importance:
        importance_K = torch.empty_like(diagonal)
        importance_K[order] = 1 / _inverse_norms(upper)
    lower_KK = upper.div_(diagonal).T.contiguous()
    del upper
    # Only now: while H is factored there are three more matrices of its size, which sets the peak memory of a run.
    scaled = h_KK / unit
    scaled.diagonal().add_(used)
    return Problem(
        h_KK=scaled,
        order=tuple(order.tolist()),
        lower_KK=lower_KK,
        pivot_K=diagonal.square_(),
        importance_K=importance_K,
        notes={"damping": used, "retries": retries, "dead_inputs": int(dead.sum())},
    )


def _inverse_norms(upper: Tensor) -> Tensor:
    """Squared length of every column of R^-1, a panel of columns at a time: the whole inverse would be a third K x K matrix.

    Column c of the inverse of an upper triangular matrix ends at row c, so a panel needs the leading part of R only.
    """
    norms = []
    for start in range(0, len(upper), PANEL):
        stop = min(start + PANEL, len(upper))
        unit = torch.zeros(stop, stop - start, dtype=upper.dtype, device=upper.device)
        unit[start:stop].fill_diagonal_(1)
        columns = torch.linalg.solve_triangular(upper[:stop, :stop], unit, upper=True)
        norms.append(columns.square_().sum(0))
    return torch.cat(norms)


def _factor(h_KK: Tensor, unit: Tensor, order: Tensor, damping: float, name: str) -> tuple[Tensor, float, int]:
    """R upper triangular with H / unit + damping = R R^T in the given order, the damping it took, and the retries."""
    attempt, retries = damping, 0
    last_first = order.flip(0)
    while True:
        # The Cholesky factor of the reversed matrix, reversed back, is upper and stands on the left.
        reversed_KK = h_KK[last_first][:, last_first].div_(unit)
        reversed_KK.diagonal().add_(attempt)
        lower, failure = torch.linalg.cholesky_ex(reversed_KK)
        del reversed_KK
        if int(failure) == 0:
            return lower.flip(0, 1), attempt, retries
        if attempt >= HIGHEST_DAMPING:
            raise RunFailed(
                f"the second moment of the inputs of {name} cannot be factored even with damping {attempt:g};"
                " calibrate with more samples, or write precision: float64"
            )
        attempt, retries = min(HIGHEST_DAMPING, max(attempt, 1e-4) * 10), retries + 1


def toward_dense(layer: Layer, problem: Problem, share: float, method: str) -> Tensor:
    """The weight whose output on the inputs that this layer now gets is nearest to that of the dense model, [N, K].

    Earlier layers are compressed, so the layer sees x where the dense model would give x'. Minimising |W x' - Q x|^2 is
    the same quadratic form around W + W C H^-1 with C = sum (x' - x) x^T (Li et al. 2025, arXiv 2504.02692, add the part
    of it that their recursion has not yet passed; Arai and Ichikawa 2025, arXiv 2504.09629, add it beforehand, as here).
    `share` of the shift is added; what share is best was measured (docs/accuracy.md).
    """
    w_NK = layer.weight_NK.float()
    stats = layer.stats
    if stats is None or stats.cross_moment_KK is None or stats.second_moment_KK is None:
        raise RunFailed(
            f"{method} needs dense and compressed inputs of {layer.name} in pairs, and there are none (routed experts have"
            " no pairs); write gptaq_experts: plain, or leave gptaq out for this weight"
        )
    # problem.h_KK is H over its mean diagonal, so the cross moment is brought to the same unit.
    diagonal = stats.second_moment_KK.diagonal()
    pull_KN = (w_NK @ stats.cross_moment_KK / diagonal[diagonal > 0].mean()).T.to(problem.h_KK.dtype)
    shift_KN: Tensor = torch.linalg.solve(problem.h_KK, pull_KN)
    return w_NK + share * shift_KN.T.float()
