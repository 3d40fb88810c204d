"""What a decode step reads and advances, whoever runs it. Slots are explained in `slots`.

Shape legend: B sequences, L slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GRAIN = 64
"""Slots are allocated in multiples of this."""


@dataclass(frozen=True)
class State:
    """What a step reads and advances; all on the model's device.

    token_B1: int64, the last token of each sequence. position_B1: int64, its place in the sequence, padding not counted.
    slot_1: int64, the slot that its key goes to. start_B: int64, the first slot of each sequence. valid_BL: bool, False
    for slots before the start.
    """

    token_B1: Tensor
    position_B1: Tensor
    slot_1: Tensor
    start_B: Tensor
    valid_BL: Tensor

    @classmethod
    def empty(cls, batch: int, slots: int, device: torch.device) -> State:
        """For `batch` sequences."""
        whole: dict[str, Any] = {"dtype": torch.int64, "device": device}
        return cls(
            torch.zeros(batch, 1, **whole),
            torch.zeros(batch, 1, **whole),
            torch.zeros(1, **whole),
            torch.zeros(batch, **whole),
            torch.ones(batch, slots, dtype=torch.bool, device=device),
        )

    def begin(self, token_B1: Tensor, length: int, start_B: Tensor) -> None:
        """Sets the state behind a prompt of `length` slots whose next tokens are `token_B1`."""
        self.token_B1.copy_(token_B1)
        self.start_B.copy_(start_B)
        self.slot_1.fill_(length)
        self.position_B1.copy_(length - start_B[:, None])
        self.valid_BL.copy_(torch.arange(self.valid_BL.shape[1], device=start_B.device)[None] >= start_B[:, None])

    def advance(self, token_B1: Tensor) -> None:
        """One token on."""
        self.token_B1.copy_(token_B1)
        self.position_B1.add_(1)
        self.slot_1.add_(1)
