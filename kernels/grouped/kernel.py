"""What a grouped matmul is: many rows, each with the weight of its own expert.

    y_s = W[expert_s] x[row_s] + b[expert_s]        s = 0 .. S-1,  row_s = s // (S / M)

Tokens are routed to a few of E experts, whose weights are packed alike and lie one after the other. The first product of an
expert reads every token S / M times (once for each expert that was chosen for it), the second reads one row per pair. An
expert number of E or more means none: its outputs are zeros.

A grouped kernel brings each expert into the layout of a kernel for a single weight, its `base`, and stacks those layouts. It
may want pairs in an order of its own, which `spread` brings them into, `run` keeps and `add` undoes; what stands between two
products only has to treat each row for itself.

Shape legend: E experts, M rows of x, S pairs of token and expert, N out features, K in features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from aerogel.kernels.problem import Kernel, Layout, Problem

Routes = list[Tensor]
"""What a kernel makes of the experts' numbers once and uses for both products of a layer; possibly nothing."""


class Grouped(ABC):
    """One way to run a grouped `Problem`, which describes the weight of one expert. Never instantiated."""

    about: ClassVar[str]
    traceable: ClassVar[bool] = True
    """As `Kernel.traceable`."""
    base: ClassVar[type[Kernel]]
    """See `base_of`."""

    @classmethod
    def base_of(cls, problem: Problem) -> type[Kernel]:
        """What packs and unpacks the weight of one expert: `base`."""
        return cls.base

    @classmethod
    def refuses(cls, problem: Problem) -> str | None:
        """Why it cannot run the problem, or None: what its `base` refuses."""
        return cls.base_of(problem).refuses(problem)

    @staticmethod
    def route(expert_S: Tensor, experts: int) -> Routes:
        """What both products need to know about who goes where. By default nothing."""
        return []

    @staticmethod
    def in_order(expert_S: Tensor, routes: Routes) -> Tensor:
        """The expert of each row in the kernel's order. By default that of pairs."""
        return expert_S

    @staticmethod
    def spread(x_MK: Tensor, routes: Routes) -> Tensor:
        """What the first product takes: rows of x in the kernel's order, or x itself, where pair s has row s // (S / M)."""
        return x_MK

    @staticmethod
    @abstractmethod
    def run(
        x_SK: Tensor, expert_S: Tensor, routes: Routes, layout: Layout, problem: Problem, bias_EN: Tensor | None = None
    ) -> Tensor:
        """y [S, N] in x's dtype and the kernel's order, from what `spread` or another product gave. `layout` holds the base's
        tensors stacked, [E, ...], and with static rounding `input_scale` [E, 1]; `expert_S` is int64."""

    @staticmethod
    def add(y_SN: Tensor, weight_Mk: Tensor, routes: Routes) -> Tensor:
        """y_t = sum over the pairs of t of weight * y_s, [M, N] in y's dtype, from rows in the kernel's order."""
        weighted_SN = y_SN * weight_Mk.reshape(-1, 1)
        return weighted_SN.reshape(*weight_Mk.shape, y_SN.shape[1]).sum(1).to(y_SN.dtype)


def pairs_by_expert(expert_S: Tensor, experts: int) -> dict[int, list[int]]:
    """The pairs of each expert that has any, in order; pairs of nobody are left out."""
    found: dict[int, list[int]] = {}
    for s, e in enumerate(expert_S.tolist()):
        if e < experts:
            found.setdefault(e, []).append(s)
    return found
