"""The tensors that one part of a walk works on, read once and changed in place of those on disk.

Shape legend: N out features, K in features.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from aerogel.model.reader import CheckpointReader
from aerogel.model.structure import Matrix


@dataclass(slots=True)
class Sources:
    """The checkpoint tensors of one part, in the type they are stored in, as they stand now."""

    reader: CheckpointReader
    device: torch.device
    tensors: dict[str, Tensor] = field(default_factory=dict)
    own_layout: set[str] = field(default_factory=set)

    def fetch(self, name: str) -> Tensor:
        """Tensor `name` on the compute device; read once, refused when a value is not finite."""
        if name not in self.tensors:
            self.tensors[name] = self.reader.read(name, finite=True).to(self.device)
        return self.tensors[name]

    def put(self, matrix: Matrix, weight_NK: Tensor) -> None:
        """Replaces one matrix by another weight."""
        old = self.tensors[matrix.tensor]
        if matrix.tensor not in self.own_layout:  # the tensor may still be shared with the dense twin: write to a copy
            old = self.tensors[matrix.tensor] = old.clone()
            self.own_layout.add(matrix.tensor)
        matrix.take(old).copy_(weight_NK)
