"""Operators for kernels whose `run` no graph can hold, because it reads numbers back to the host: shapes, or who goes where.

`torch.compile(fullgraph=True)` meets such a kernel in a `Linear` or an `ExpertLinear`, which calls the operator instead. What
an operator cannot be given, the kernel and its problem, is kept here when a layer is prepared, under a name that says it all.

Shape legend: M tokens, N out features, K in features, E experts, S pairs of token and expert.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from aerogel.kernels.problem import Layout, Problem

if TYPE_CHECKING:
    from aerogel.kernels.expert_linears import ExpertLinears

_modules: WeakValueDictionary[str, ExpertLinears] = WeakValueDictionary()
_numbers = itertools.count()
_kept: dict[str, tuple[Any, Problem]] = {}


def keep(kernel: Any, problem: Problem) -> str:
    """The name under which the operators find a kernel (or grouped kernel) and its problem; the same in every process."""
    name = f"{kernel.__module__}.{kernel.__name__} {problem}"
    _kept[name] = kernel, problem
    return name


def linear(x_MK: Tensor, layout: Layout, bias_N: Tensor | None, N: int, name: str) -> Tensor:
    """`Kernel.run` of what was kept under `name`, as one node of a graph."""
    y_MN: Tensor = torch.ops.aerogel.whole_linear.default(x_MK, list(layout.values()), list(layout), bias_N, N, name)
    return y_MN


def experts(
    x_SK: Tensor, expert_S: Tensor, routes: list[Tensor], layout: Layout, bias_EN: Tensor | None, N: int, name: str
) -> Tensor:
    """`Grouped.run` of what was kept under `name`, as one node of a graph."""
    y_SN: Tensor = torch.ops.aerogel.whole_experts.default(
        x_SK, expert_S, routes, list(layout.values()), list(layout), bias_EN, N, name
    )
    return y_SN


def keep_experts(module: ExpertLinears) -> str:
    """The name under which the operator finds experts that are linears of their own, as long as they live in this process."""
    name = f"experts {next(_numbers)}"
    _modules[name] = module
    return name


def experts_apart(x_MK: Tensor, expert_S: Tensor, bias_EN: Tensor | None, N: int, name: str) -> Tensor:
    """`ExpertLinears.product` of what was kept under `name`, as one node of a graph."""
    y_SN: Tensor = torch.ops.aerogel.experts_apart.default(x_MK, expert_S, bias_EN, N, name)
    return y_SN


def _experts_apart(x: Tensor, expert: Tensor, bias: Tensor | None, N: int, name: str) -> Tensor:
    return _modules[name].product(x, expert, bias)


def _linear(x: Tensor, tensors: list[Tensor], names: list[str], bias: Tensor | None, N: int, name: str) -> Tensor:
    kernel, problem = _kept[name]
    y: Tensor = kernel.run(x, dict(zip(names, tensors, strict=True)), problem, bias)
    return y


def _experts(
    x: Tensor,
    expert: Tensor,
    routes: list[Tensor],
    tensors: list[Tensor],
    names: list[str],
    bias: Tensor | None,
    N: int,
    name: str,
) -> Tensor:
    kernel, problem = _kept[name]
    y: Tensor = kernel.run(x, expert, routes, dict(zip(names, tensors, strict=True)), problem, bias)
    return y


_library = torch.library.Library("aerogel", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema, _function, _fake in (
    (
        "whole_linear(Tensor x, Tensor[] layout, str[] names, Tensor? bias, SymInt N, str name) -> Tensor",
        _linear,
        lambda x, layout, names, bias, N, name: x.new_empty(x.shape[0], N),
    ),
    (
        "experts_apart(Tensor x, Tensor expert, Tensor? bias, SymInt N, str name) -> Tensor",
        _experts_apart,
        lambda x, expert, bias, N, name: x.new_empty(expert.shape[0], N),
    ),
    (
        "whole_experts(Tensor x, Tensor expert, Tensor[] routes, Tensor[] layout, str[] names, Tensor? bias, SymInt N,"
        " str name) -> Tensor",
        _experts,
        lambda x, expert, routes, layout, names, bias, N, name: x.new_empty(expert.shape[0], N),
    ),
):
    _name = _schema.partition("(")[0]
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    _library.impl(_name, _function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"aerogel::{_name}", _fake, lib=_library)
