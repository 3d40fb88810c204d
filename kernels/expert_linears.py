"""Experts that cannot lie in one stack: each weight a packed linear of its own, called for the tokens that chose its expert.

Experts of different widths, with columns in an order of their own, or with weights beside their codes (outliers, kept columns)
differ in the shapes of their tensors. Here each matrix of the checkpoint is a `Linear` as any other, on whatever kernel that
has; matrices that transformers joins (gate and up) are called one after the other, and their outputs stand side by side. Which
experts were chosen is read back to the host, so no CUDA graph can record it; other graphs hold it as one operator.

Shape legend: E experts, M tokens, S pairs of token and expert, N out features, K in features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aerogel.kernels import graphs
from aerogel.kernels.gradients import inference_only
from aerogel.kernels.grouped.kernel import Routes, pairs_by_expert
from aerogel.kernels.grouped.ref import Reference
from aerogel.kernels.linear import Linear


class ExpertLinears(nn.Module):
    """`y_s = W[e_s] x_s + b[e_s]`, as `ExpertLinear`, with W[e] the linears of expert e, one below the other.

    Args:
        experts: the linears of each expert, all [., K], of N rows together.
    """

    def __init__(self, experts: Sequence[Sequence[Linear]]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.ModuleList(parts) for parts in experts)
        self.experts, self.in_features = len(experts), experts[0][0].in_features
        self.out_features = sum(part.out_features for part in experts[0])
        self._graph_name = graphs.keep_experts(self)

    def linears(self, expert: int) -> list[Linear]:
        """Those of one expert."""
        return [part for part in self.parts[expert].children() if isinstance(part, Linear)]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is found under a name of its own."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._graph_name = graphs.keep_experts(self)

    @property
    def kernel_name(self) -> str:
        """Of all kernels."""
        names = {str(part.kernel_name) for e in range(self.experts) for part in self.linears(e)}
        return ", ".join(sorted(names))

    def routes(self, expert_S: Tensor) -> Routes:
        """Nothing."""
        return []

    def spread(self, x_MK: Tensor, routes: Routes) -> Tensor:
        """x itself."""
        return x_MK

    def add(self, y_SN: Tensor, weight_Mk: Tensor, routes: Routes) -> Tensor:
        """See `Grouped.add`."""
        return Reference.add(y_SN, weight_Mk, routes)

    @inference_only
    def forward(self, x_MK: Tensor, expert_S: Tensor, routes: Routes, bias_EN: Tensor | None = None) -> Tensor:
        """y [S, N] in x's dtype; pair s with row s // (S / M) of x."""
        return graphs.experts_apart(x_MK, expert_S, bias_EN, self.out_features, self._graph_name)

    def product(self, x_MK: Tensor, expert_S: Tensor, bias_EN: Tensor | None) -> Tensor:
        """What the operator runs."""
        y_SN = x_MK.new_zeros(len(expert_S), self.out_features)
        each = max(1, len(expert_S) // max(1, len(x_MK)))
        for e, places in pairs_by_expert(expert_S, self.experts).items():
            rows = x_MK[[s // each for s in places]]
            y = torch.cat([part(rows) for part in self.linears(e)], -1)
            y_SN[places] = y if bias_EN is None else y + bias_EN[e].to(y.dtype)
        return y_SN

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weights [E, N, K]; bit for bit what the file decodes to."""
        return torch.stack([torch.cat([part.dequantize(dtype) for part in self.linears(e)]) for e in range(self.experts)])

    @property
    def packed_bytes(self) -> int:
        """Bytes of the weights as they lie in memory."""
        return sum(part.packed_bytes for e in range(self.experts) for part in self.linears(e))

    def extra_repr(self) -> str:
        """Experts, shape and kernels."""
        return f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}, {self.kernel_name}"
