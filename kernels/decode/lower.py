"""The same step through cheaper calls, for the CPU, where a call costs as much as its work.

An operator reached as `torch.ops.aten.view.default` takes 1.5 microseconds of Python and dispatcher before anything is
done, `Tensor.view` takes 0.4; an operator of our own that is written in Python goes through the dispatcher twice. On a
small model a token has a thousand such calls. None of these rewrites changes a number:

    view -> mm -> view       becomes one F.linear, which does the same views in C++
    views                    become methods of the tensor
    our own operators        become the functions that implement them
    packed linears           call their kernel with everything looked up once (`straight`)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from aerogel.kernels.decode import ops
from aerogel.kernels.linear import Linear

aten = torch.ops.aten

_METHODS: dict[Any, str] = {
    aten.view.default: "view",
    aten._unsafe_view.default: "view",
    aten.transpose.int: "transpose",
    aten.unsqueeze.default: "unsqueeze",
    aten.expand.default: "expand",
}
_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    aten.mm.default: torch.mm,
    aten.add.Tensor: torch.add,
    aten.mul.Tensor: torch.mul,
    aten.cos.default: torch.cos,
    aten.sin.default: torch.sin,
    aten.cat.default: torch.cat,
}


def straight(module: Linear) -> Callable[[Tensor], Tensor]:
    """The module's forward without what it looks up anew on every call. Only as long as its weight stays in its layout."""
    whole: Callable[[Tensor], Tensor] = type(module).forward.__get__(module)
    problem = module._problem
    if problem is None or not module.kernel_is_all or module.column_order is not None:
        return whole
    run, tensors, bias, K, N, dtype = module._kernel.run, module._tensors(), module.bias, problem.K, problem.N, problem.dtype

    def forward(x: Tensor) -> Tensor:
        if x.dtype is not dtype or not x.is_contiguous():
            return whole(x)
        return run(x.view(-1, K), tensors, problem, bias).view(*x.shape[:-1], N)

    forward.module = module  # type: ignore[attr-defined]  # what a rewrite of the graph may want to know
    return forward


def lower(graph: fx.GraphModule) -> None:
    """Rewrites a traced and fused step in place. The caller cleans it afterwards."""
    own = {getattr(torch.ops.aerogel, name).default: ops.on_cpu(name) for name in ops.SCHEMAS}
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in (aten.view.default, aten._unsafe_view.default) and _linear(graph, node):
            continue
        if node.target in _METHODS:
            node.op, node.target = "call_method", _METHODS[node.target]
        elif node.target == aten.slice.Tensor:
            _narrow(node)
        elif node.target in own:
            node.target = own[node.target]
        elif node.target in _FUNCTIONS:
            node.target = _FUNCTIONS[node.target]


def _linear(graph: fx.GraphModule, node: fx.Node) -> bool:
    """`node` views a product of a viewed input with a transposed weight: one F.linear instead."""
    product = node.args[0]
    if not isinstance(product, fx.Node) or product.target not in (aten.mm.default, torch.mm) or len(product.users) != 1:
        return False
    left, weight = product.args
    # In a single pass from the front the input's view has been rewritten already.
    if not isinstance(left, fx.Node) or left.target not in (aten.view.default, "view") or not isinstance(weight, fx.Node):
        return False
    x = left.args[0]
    if weight.op != "get_attr" or not isinstance(x, fx.Node):
        return False
    before, after, turned = x.meta["seen"].shape, node.meta["seen"].shape, getattr(graph, str(weight.target))
    if before[:-1] != after[:-1] or before[-1] != turned.shape[0] or not turned.T.is_contiguous():
        return False
    name = f"{weight.target}_NK"
    if not hasattr(graph, name):
        graph.register_buffer(name, turned.T, persistent=False)
    with graph.graph.inserting_before(node):
        straight = graph.graph.get_attr(name)
        new = graph.graph.call_function(torch.nn.functional.linear, (x, straight))
    straight.meta, new.meta = {"seen": weight.meta["seen"]}, dict(node.meta)
    node.replace_all_uses_with(new)
    return True


def _narrow(node: fx.Node) -> None:
    """x[start:end] along one dimension, step 1."""
    arguments: list[Any] = [*node.args, *(None,) * (5 - len(node.args))]
    x, dim, start, end, step = arguments
    size = x.meta["seen"].shape[dim or 0]
    first, last = start or 0, size if end is None else end
    if step not in (None, 1) or not all(isinstance(value, int) for value in (first, last)) or first < 0 or last < 0:
        return
    node.op, node.target = "call_method", "narrow"
    node.args, node.kwargs = (x, dim or 0, first, max(0, min(last, size) - first)), {}
