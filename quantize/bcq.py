"""BCQ: signs and their scales by greedy fitting, then alternating refinement.

Minimise sum_k d_k (w_k - offset - sum_i alpha_i b_i,k)^2 over every group, d the mean square of the input (LUT-GEMM, Park et
al. 2022, arXiv 2206.09557, section 3; the alternation is that of Xu et al. 2018, arXiv 1802.00150):

    greedy     b_i = sign(r), alpha_i = sum d |r| / sum d, r <- r - alpha_i b_i
    scales     for given signs, alpha solves the q x q normal equations (B^T D B) alpha = B^T D w
    signs      for given scales, every weight takes the nearest of the 2^q sums

Scales are rounded to the type they are stored in inside the loop. A rounded scale may cost more than the one before, so
each group keeps the best it has seen: the error never goes up, whatever is rounded. Powers of two are chosen one plane at
a time: with the other planes fixed the cost is a parabola in alpha_i, and its best power of two is the nearest one.
Alternation finds the nearest valley, so it starts twice, from the greedy planes and from uniform levels, and the better end
counts. (Greedy alone ends 17 % higher at four bits on a Gaussian, and powers of two hardly leave where greedy puts them.)

Cost: q + 1 passes greedy; a round takes about 2 q + 2 passes and one small solve per group.
Shape legend: R groups (of all outputs), m members of a group, q planes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.model.layer import Layer, Need
from aerogel.quantize.codes import Grid, Params, quantized
from aerogel.quantize.levels import Levels
from aerogel.quantize.planes import PlaneGrid, sign_of, sums_of
from aerogel.quantize.problem import check_weight, second_moment
from aerogel.quantize.rtn import known_loss, weight_error

ROUNDS = 15
"""Rounds of refinement where nothing else is said, as LUT-GEMM's own code has it."""
RANGES = (1.0, 0.85, 0.7, 0.6, 0.5)
"""Shares of a group's range that uniform planes are tried on."""
CHUNK = 1 << 18
"""Weights that are fitted at a time, each from two starts on five ranges."""


@dataclass(frozen=True, kw_only=True)
class Bcq:
    """Stage `Layer -> Layer`.

    grid: the planes.
    rounds: of alternating refinement after the greedy fit; 0 leaves that.
    weighted: errors count by the mean square of the input they meet; needs calibration.
    """

    makes: ClassVar[str] = "planes"

    grid: Grid
    rounds: int = ROUNDS
    weighted: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.grid, PlaneGrid):
            raise BadInput("method bcq makes bit planes; write format: planes, or method: gptq for other formats")
        if self.rounds < 0:
            raise BadInput(f"rounds must be 0 or more, found {self.rounds}")

    @property
    def needs(self) -> frozenset[Need]:
        """The statistics asked of calibration."""
        return frozenset({"second_moment"} if self.weighted else ())

    def __call__(self, layer: Layer) -> Layer:
        """The layer with codes; its loss is known where it has statistics. Raises `BadInput` for a pruned weight."""
        check_weight(layer, "bcq")
        if layer.mask_NK is not None:
            raise BadInput(f"{layer.name} is pruned, and bit planes cannot hold zeros; write method: gptq with format: int")
        grid = self.grid
        if not isinstance(grid, PlaneGrid):
            raise BadInput(f"bcq works on bit planes, not on a {type(grid).__name__}; write format: planes")
        importance_K = second_moment(layer, "bcq (weighted)").diagonal() if self.weighted else None
        w_NK = layer.weight_NK.float()
        codes = quantized(grid, w_NK, fit_planes(grid, w_NK, importance_K, self.rounds))
        weight_NK = codes.decode()
        return layer.with_(
            weight_NK=weight_NK, codes=codes, loss=known_loss(layer, weight_NK), notes=weight_error(layer, weight_NK)
        )


def fit_planes(grid: PlaneGrid, w_NK: Tensor, importance_K: Tensor | None, rounds: int) -> Params:
    """Scales and offsets of planes for a weight.

    Args:
        grid: how many planes, which groups, how scales are stored.
        w_NK: float [N, K].
        importance_K: cost of a squared error at each input, or None for 1.
        rounds: of refinement.
    """
    N, K = w_NK.shape
    tall, size = grid.block_rows, min(grid.group_size or K, K)
    G = grid.groups(K)
    weight_K = torch.ones(K, device=w_NK.device) if importance_K is None else importance_K.float().clamp(min=0)
    # An input that was never seen still has weights, which should not be arbitrary.
    weight_K = weight_K + 1e-6 * weight_K.mean() + torch.finfo(torch.float32).tiny
    weight_Gm = torch.nn.functional.pad(weight_K / weight_K.mean(), (0, -K % size)).reshape(G, 1, size)
    alphas, offsets = [], []
    rows = max(1, CHUNK // (K * tall)) * tall
    for start in range(0, N, rows):
        part = w_NK[start : start + rows].float()
        height = torch.arange(-(-len(part) // tall) * tall, device=w_NK.device) < len(part)
        blocks = torch.nn.functional.pad(part, (0, -K % size, 0, -len(part) % tall)).reshape(-1, tall, G, size)
        w_Rm = blocks.transpose(1, 2).reshape(-1, tall * size)
        present = height.reshape(-1, 1, tall, 1).expand(-1, G, tall, size)
        found = refine(grid, w_Rm, (weight_Gm * present).reshape(w_Rm.shape), rounds)
        alphas.append(found.alpha_Rq.reshape(-1, G, grid.bits))
        offsets.append(found.offset_R.reshape(-1, G))
    return grid.params_of(torch.cat(alphas), torch.cat(offsets))


class Fit(NamedTuple):
    """Planes of R groups: scales (as stored, falling, not negative), offsets, and the weighted squared error they leave."""

    alpha_Rq: Tensor
    offset_R: Tensor
    cost_R: Tensor

    def best(self, other: Fit) -> Fit:
        """Group by group the cheaper of the two."""
        wins = other.cost_R < self.cost_R
        return Fit(*(torch.where(wins.reshape(-1, *[1] * (a.dim() - 1)), b, a) for a, b in zip(self, other, strict=True)))


def refine(grid: PlaneGrid, w_Rm: Tensor, weight_Rm: Tensor, rounds: int) -> Fit:
    """The best planes found in `rounds` of alternation; 0 leaves the greedy ones. More rounds never cost more."""
    first = greedy(grid, w_Rm, weight_Rm)
    if not rounds:
        return first
    # Both starts in one go: small groups, fitted while a solver runs, are many small operations.
    starts = Fit(*(torch.cat(pair) for pair in zip(first, uniform(grid, w_Rm, weight_Rm), strict=True)))
    ends = alternate(grid, w_Rm.repeat(2, 1), weight_Rm.repeat(2, 1), starts, rounds)
    from_greedy, from_uniform = zip(*(part.chunk(2) for part in ends), strict=True)
    return Fit(*from_greedy).best(Fit(*from_uniform))


def alternate(grid: PlaneGrid, w_Rm: Tensor, weight_Rm: Tensor, best: Fit, rounds: int) -> Fit:
    """`rounds` of scales for given signs and signs for given scales; no group's cost goes up."""
    now = best
    for _ in range(rounds):
        codes_Rm = Levels.of(sums_of(now.alpha_Rq, now.offset_R)).nearest_codes(w_Rm)
        now = _judged(grid, w_Rm, weight_Rm, *_scales(grid, w_Rm, weight_Rm, codes_Rm, now))
        better = best.best(now)
        if torch.equal(better.cost_R, best.cost_R):
            break
        now = best = better
    return best


def greedy(grid: PlaneGrid, w_Rm: Tensor, weight_Rm: Tensor) -> Fit:
    """One plane after the other, each fitted to what the earlier ones left."""
    total_R = weight_Rm.sum(1)
    offset_R = (weight_Rm * w_Rm).sum(1) / total_R if grid.offset != "none" else torch.zeros_like(total_R)
    offset_R = grid.store_offset(offset_R)
    rest_Rm, alphas = w_Rm - offset_R[:, None], []
    for _ in range(grid.bits):
        alpha_R = grid.store((weight_Rm * rest_Rm.abs()).sum(1) / total_R)
        rest_Rm = rest_Rm - alpha_R[:, None] * torch.where(rest_Rm < 0, -1.0, 1.0)
        alphas.append(alpha_R)
    return _judged(grid, w_Rm, weight_Rm, torch.stack(alphas, 1), offset_R)


def uniform(grid: PlaneGrid, w_Rm: Tensor, weight_Rm: Tensor) -> Fit:
    """Evenly spaced sums over the best of a few ranges."""
    share_S1 = torch.tensor(RANGES, device=w_Rm.device)[:, None]
    step = grid.step_of_range((w_Rm.amin(1) * share_S1).flatten(), (w_Rm.amax(1) * share_S1).flatten())
    every = (w_Rm.repeat(len(RANGES), 1), weight_Rm.repeat(len(RANGES), 1))
    fits = zip(*(part.chunk(len(RANGES)) for part in _judged(grid, *every, step.scale, torch.as_tensor(step.low))), strict=True)
    return functools.reduce(Fit.best, (Fit(*fit) for fit in fits))


def _judged(grid: PlaneGrid, w_Rm: Tensor, weight_Rm: Tensor, alpha_Rq: Tensor, offset_R: Tensor) -> Fit:
    """Scales with their signs moved into the planes and in falling order, and what they cost."""
    alpha_Rq = alpha_Rq.abs().sort(1, descending=True).values
    error = Levels.of(sums_of(alpha_Rq, offset_R)).nearest(w_Rm).sub_(w_Rm)
    return Fit(alpha_Rq, offset_R, (weight_Rm * error.square_()).sum(1))


def _scales(grid: PlaneGrid, w_Rm: Tensor, weight_Rm: Tensor, codes_Rm: Tensor, now: Fit) -> tuple[Tensor, Tensor]:
    """The best scales and offsets for given signs, as stored."""
    signs = [sign_of(codes_Rm, grid.bits, i) for i in range(grid.bits)]
    signs += [torch.ones_like(w_Rm)] if grid.offset != "none" else []
    basis_Rqm = torch.stack(signs, 1)
    pull_Rqm = basis_Rqm * weight_Rm[:, None]
    gram_Rqq = (pull_Rqm @ basis_Rqm.transpose(1, 2)).double()
    right_Rq = (pull_Rqm @ w_Rm[..., None])[..., 0].double()
    wide = torch.cat([now.alpha_Rq, now.offset_R[:, None]], 1)[:, : len(signs)].double()
    if not grid.power_of_two:
        # Two planes that agree everywhere make the matrix singular; a little on its diagonal shares out between them.
        little_R11 = 1e-9 * gram_Rqq.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        wide = torch.linalg.solve(gram_Rqq + little_R11 * torch.eye(len(signs), device=w_Rm.device), right_Rq)
    for i in range(len(signs)):
        others = right_Rq[:, i] - (gram_Rqq[:, i] * wide).sum(1) + gram_Rqq[:, i, i] * wide[:, i]
        wanted = (others / gram_Rqq[:, i, i]).float()
        wide[:, i] = (grid.store(wanted) if i < grid.bits else grid.store_offset(wanted)).double()
    offset_R = wide[:, -1].float() if grid.offset != "none" else now.offset_R
    return wide[:, : grid.bits].float(), offset_R
