"""A sweep decided in runs against the same sweep decided column by column, on any device."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from aerogel.kernels.rounding import columns
from aerogel.quantize.formats.bitmod import Bitmod
from aerogel.quantize.formats.floats import Float
from aerogel.quantize.formats.kmeans import KMeans
from aerogel.quantize.formats.nf4 import Nf4
from aerogel.quantize.grids import IntGrid
from aerogel.quantize.refine import OnGrid
from aerogel.quantize.sweep import sweep

GRIDS: dict[str, Any] = {
    "symmetric": IntGrid(bits=4, group_size=16),
    "zero points": IntGrid(bits=3, group_size=20, symmetric=False),
    "one table": Nf4(group_size=32),
    "picked tables": Bitmod(bits=3, group_size=16),
    "a table per row": KMeans(bits=3),
    "256 numbers": Float(kind="e5m2"),
}
SHAPES = [(1, 5), (37, 72), (64, 40)]
CASES = list(itertools.product(GRIDS, SHAPES, (False, True)))
"""Numbers, outputs and inputs, whether some are masked."""
FEW_CASES = [
    (name, shape, (place + turn) % 2 == 1) for place, name in enumerate(GRIDS) for turn, shape in enumerate([(1, 5), (37, 40)])
]
"""For an interpreter: two runs, several groups, a program that is not full; each kind of numbers with a mask and without."""


def both(grid: Any, N: int, K: int, device: str, masked: bool) -> tuple[Tensor, Tensor]:
    """(decided in runs, decided one by one): chosen values [K, N] of a sweep in some order with strong feedback."""
    torch.manual_seed(N * K)
    w_KN = torch.randn(K, N).to(device)
    lower_KK = (0.3 * torch.randn(K, K).tril(-1)).to(device)
    mask_KN = (torch.rand(K, N) > 0.3).float().to(device) if masked else None
    order = tuple(torch.randperm(K).tolist())
    rounder = grid.rounder(grid.fit(w_KN.T.contiguous()), N, K)
    chooser = OnGrid(rounder, order, mask_KN)
    if chooser.at_once() is None:
        raise AssertionError("this machine cannot decide columns in runs")
    together = sweep(w_KN, w_KN, lower_KK, chooser)
    one_by_one = sweep(w_KN, w_KN, lower_KK, OneByOne(rounder, order, mask_KN))
    return together, one_by_one


class OneByOne(OnGrid):
    """Never in runs."""

    def at_once(self) -> None:
        """No."""


def failures(device: str, cases: Iterable[tuple[str, tuple[int, int], bool]] = CASES) -> list[str]:
    """One line for every case that differs. A tie that falls the other way after a sum in another order may move a value
    and what follows it, so a share of one in fifty is let pass."""
    failed = []
    for name, (N, K), masked in cases:
        together, one_by_one = both(GRIDS[name], N, K, device, masked)
        differ = (together - one_by_one).abs() > 1e-5
        if not together.isfinite().all() or float(differ.float().mean()) > 0.02:
            failed.append(f"{name} [{N}, {K}] masked {masked}: {int(differ.sum())} of {differ.numel()} values differ")
    return failed


def force() -> None:
    """Decide in runs on a CPU too, which Triton's interpreter can."""
    columns.missing = lambda device, dtype: None
