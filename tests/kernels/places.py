"""Where inputs may lie in memory: the same numbers, misaligned or strided, with NaN where nobody may read."""

from __future__ import annotations

import torch
from torch import Tensor


def one_number_late(x_MK: Tensor) -> Tensor:
    held = x_MK.new_full((x_MK.numel() + 1,), torch.nan)
    held[1:] = x_MK.flatten()
    return held[1:].view(x_MK.shape)


def part_of_a_wider(x_MK: Tensor) -> Tensor:
    return torch.nn.functional.pad(x_MK, (3, 2), value=torch.nan)[:, 3:-2]


def column_by_column(x_MK: Tensor) -> Tensor:
    return x_MK.T.contiguous().T


def every_other(x_MK: Tensor) -> Tensor:
    return torch.stack([x_MK, torch.full_like(x_MK, torch.nan)], -1).flatten(-2)[:, ::2]


PLACES = (one_number_late, part_of_a_wider, column_by_column, every_other)
