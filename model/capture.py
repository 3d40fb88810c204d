"""Sums over the inputs of linears while calibration data runs through a block.

Second moments are raw sums in float32 with a token count beside them; whoever uses them divides. Only the upper
triangle of x^T x is computed, in column panels, and mirrored at the end: a third less work for wide inputs.

Shape legend: T tokens, K in features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aerogel.errors import RunFailed
from aerogel.model.layer import Stats
from aerogel.model.precision import coarse_products

PANEL = 256
"""Columns of x^T x made at a time. Narrow panels waste little of the lower triangle and still fill the matrix units."""
MAX_SKIPPED_SHARE = 0.01


class Accumulator:
    """What one linear's input adds up to. `add` once per batch, `stats` at the end.

    Args:
        k: in features.
        cross: also sum (x_dense - x) x^T, which needs the dense model's input beside each batch.
        device: where the sums live.
    """

    def __init__(self, k: int, *, cross: bool, device: torch.device) -> None:
        self.tokens = self.skipped = 0
        self.second_KK = torch.zeros(k, k, device=device)
        self.peak_K = torch.zeros(k, device=device)
        self.cross_KK = torch.zeros(k, k, device=device) if cross else None

    def add(self, x: Tensor, x_dense: Tensor | None = None) -> None:
        """Adds the tokens of `x` [..., K]; rows with NaN or infinity are left out and counted."""
        x_TK = x.detach().reshape(-1, x.shape[-1])
        dense_TK = x_dense.detach().reshape(-1, x.shape[-1]) if x_dense is not None else None
        with coarse_products(x.dtype == torch.bfloat16):
            x_TK, dense_TK = x_TK.float(), dense_TK.float() if dense_TK is not None else None
            # The sum is finite only if every value is; it costs one pass, where isfinite would cost a mask.
            if not bool((x_TK.sum() if dense_TK is None else x_TK.sum() + dense_TK.sum()).isfinite()):
                good = x_TK.isfinite().all(dim=1)
                if dense_TK is not None:
                    good &= dense_TK.isfinite().all(dim=1)
                self.skipped += int((~good).sum())
                x_TK, dense_TK = x_TK[good], dense_TK[good] if dense_TK is not None else None
            self.tokens += len(x_TK)
            if len(x_TK):
                self.peak_K = torch.maximum(self.peak_K, x_TK.abs().amax(0))
            k = x_TK.shape[1]
            for begin in range(0, k, PANEL):
                panel = x_TK[:, begin : begin + PANEL]
                self.second_KK[begin : begin + PANEL, begin:].addmm_(panel.T, x_TK[:, begin:])
            if self.cross_KK is not None and dense_TK is not None:
                self.cross_KK.addmm_((dense_TK - x_TK).T, x_TK)

    def stats(self, name: str) -> Stats:
        """The sums as `Stats`, to be taken once; `RunFailed` when more than one token in a hundred was not finite."""
        if self.skipped > MAX_SKIPPED_SHARE * max(1, self.tokens + self.skipped):
            raise RunFailed(
                f"{self.skipped} of {self.tokens + self.skipped} calibration tokens reach {name} with NaN or infinity;"
                " run with calibration.compute: float32, or check the checkpoint"
            )
        k = len(self.second_KK)
        for begin in range(0, k, PANEL):  # mirrored panel by panel: the sums of a wide layer are too large to copy
            end = min(begin + PANEL, k)
            corner = self.second_KK[begin:end, begin:end]
            corner.copy_(corner.triu() + corner.triu(1).T)
            self.second_KK[end:, begin:end] = self.second_KK[begin:end, end:].T
        return Stats(
            tokens=self.tokens,
            second_moment_KK=self.second_KK,
            cross_moment_KK=self.cross_KK,
            peak_K=self.peak_K,
            skipped=self.skipped,
        )
