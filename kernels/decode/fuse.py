"""Finds the small operations of a step and replaces each group by one operator of `ops`.

The patterns are those of the formulas, not of an architecture: whatever computes w h / sqrt(mean(h^2) + eps) with these
operators is a norm, wherever it stands. Two forms of each norm are known (rounding before the weight as in Llama, after
it as in Gemma). What is not recognised stays as it is and is only slower, so nothing has to match.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

from aerogel.kernels.decode import ops as _ops  # noqa: F401  (defines the operators)
from aerogel.kernels.decode.trace import Seen

aten = torch.ops.aten
aerogel = torch.ops.aerogel

_COPIES = (aten._to_copy.default,)
_VIEWS = (aten.view.default, aten._unsafe_view.default)
_GATES: dict[Any, str] = {aten.silu.default: "silu", aten.gelu.default: "gelu"}


def fuse(graph: fx.GraphModule) -> dict[str, int]:
    """Rewrites the trace in place; returns how often each operator was put in."""
    return {
        "rms_norm": _each(graph, _norm),
        "add_rms_norm": _each(graph, _add_norm),
        "gate": _each(graph, _gate),
        "rotation": _each(graph, _rotation),
    }


def _each(graph: fx.GraphModule, rewrite: Callable[[fx.GraphModule, Any], bool]) -> int:
    return sum(rewrite(graph, node) for node in list(graph.graph.nodes))


def _is(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def _value(node: Any) -> Seen:
    found: Seen = node.meta["seen"]
    return found


def _shape(node: Any) -> tuple[int, ...]:
    return _value(node).shape


def _through(node: Any, targets: tuple[Any, ...]) -> Any:
    while _is(node, *targets):
        node = node.args[0]
    return node


def _pairs(node: Any) -> Iterator[tuple[Any, Any]]:
    yield node.args[0], node.args[1]
    yield node.args[1], node.args[0]


@dataclass(frozen=True)
class _Norm:
    x: Any
    eps: float


def _unit(node: Any) -> _Norm | None:
    """x / sqrt(mean(x^2) + eps) in float32."""
    if not _is(node, aten.mul.Tensor):
        return None
    for wide, root in _pairs(node):
        if not _is(root, aten.rsqrt.default, aten.pow.Tensor_Scalar):
            continue
        if root.target == aten.pow.Tensor_Scalar and root.args[1] != -0.5:
            continue
        total = root.args[0]
        if not _is(total, aten.add.Tensor) or not isinstance(total.args[1], float):
            continue
        mean = total.args[0]
        if not _is(mean, aten.mean.dim) or list(mean.args[1]) != [-1] or not mean.args[2]:
            continue
        square = mean.args[0]
        squared = _is(square, aten.pow.Tensor_Scalar) and square.args[0] is wide and square.args[1] == 2
        product = _is(square, aten.mul.Tensor) and square.args[0] is wide and square.args[1] is wide
        if (squared or product) and _value(wide).dtype == torch.float32:
            return _Norm(_through(wide, _COPIES), total.args[1])
    return None


def _norm(graph: fx.GraphModule, node: Any) -> bool:
    """w * round(unit(x)), or round(unit(x) * w)."""
    if not _is(node, aten.mul.Tensor):
        return False
    for weight, inner in _pairs(node):
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            continue
        unit, end = _unit(_through(inner, _COPIES)), node
        if unit is None or _shape(weight) != _shape(unit.x)[-1:]:
            continue
        dtype = _value(unit.x).dtype
        first = _value(inner).dtype == dtype
        if not first:
            users = list(node.users)
            if len(users) != 1 or not _is(users[0], *_COPIES):
                return False
            end = users[0]
        if _value(end).dtype != dtype:
            return False
        with graph.graph.inserting_before(end):
            new = graph.graph.call_function(aerogel.rms_norm.default, (unit.x, weight, unit.eps, first))
        new.meta = dict(end.meta)
        end.replace_all_uses_with(new)
        return True
    return False


def _add_norm(graph: fx.GraphModule, node: Any) -> bool:
    """The norm of a sum also writes the sum."""
    if not _is(node, aerogel.rms_norm.default):
        return False
    total = node.args[0]
    if not _is(total, aten.add.Tensor) or total.kwargs or len(total.args) != 2:
        return False
    a, b = total.args
    if not all(
        isinstance(x, fx.Node) and _shape(x) == _shape(total) and _value(x).dtype == _value(total).dtype for x in (a, b)
    ):
        return False
    with graph.graph.inserting_after(total):
        pair = graph.graph.call_function(aerogel.add_rms_norm.default, (a, b, *node.args[1:]))
    with graph.graph.inserting_after(pair):
        first, second = graph.graph.call_function(getitem, (pair, 0)), graph.graph.call_function(getitem, (pair, 1))
    first.meta, second.meta = dict(total.meta), dict(node.meta)
    total.replace_all_uses_with(first)
    node.replace_all_uses_with(second)
    return True


def _gate(graph: fx.GraphModule, node: Any) -> bool:
    """act(g) * u."""
    if not _is(node, aten.mul.Tensor):
        return False
    for active, u in _pairs(node):
        if not _is(active, *_GATES) or not isinstance(u, fx.Node) or len(active.users) != 1:
            continue
        g = active.args[0]
        if _shape(g) != _shape(u) or _value(g).dtype != _value(u).dtype or _value(g).strides != _value(u).strides:
            continue
        act = _GATES[active.target]
        if active.kwargs.get("approximate", "none") == "tanh":
            act = "gelu_tanh"
        with graph.graph.inserting_before(node):
            new = graph.graph.call_function(aerogel.gate.default, (g, u, act))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        return True
    return False


def _rotated(node: Any) -> tuple[Any, Any, Any] | None:
    """(x, cos, sin) of x cos + [-x2, x1] sin, the angles as [B, 1, D]."""
    if not _is(node, aten.add.Tensor) or node.kwargs:
        return None
    for straight, crossed in _pairs(node):
        if not _is(straight, aten.mul.Tensor) or not _is(crossed, aten.mul.Tensor):
            continue
        for turned, sin in _pairs(crossed):
            x = _turned(turned)
            for same, cos in _pairs(straight):
                angles = [_angles(a) for a in (cos, sin)]
                if x is not None and same is x and None not in angles:
                    return x, angles[0], angles[1]
    return None


def _turned(node: Any) -> Any:
    """x of cat([-x[half:], x[:half]])."""
    if not _is(node, aten.cat.default) or len(node.args[0]) != 2:
        return None
    high, low = node.args[0]
    if not _is(high, aten.neg.default) or not _is(low, aten.slice.Tensor) or not _is(high.args[0], aten.slice.Tensor):
        return None
    x, last = low.args[0], len(_shape(low)) - 1
    half = _shape(x)[-1] // 2
    top = high.args[0]
    right = top.args[0] is x and top.args[1] == low.args[1] == last and low.args[2] == 0
    return x if right and low.args[3] == half == top.args[2] and _shape(x)[-1] == 2 * half else None


def _angles(node: Any) -> Any:
    """[B, 1, D] behind the dimension for heads."""
    if _is(node, aten.unsqueeze.default) and node.args[1] == 1 and len(_shape(node)) == 4:
        return node.args[0]
    return None


def _rotation(graph: fx.GraphModule, node: Any) -> bool:
    """Attention takes q and k before they are rotated."""
    if not _is(node, aerogel.attend.default) or node.args[3] is not None:
        return False
    q, k = _rotated(node.args[0]), _rotated(node.args[1])
    if q is None or k is None or q[1] is not k[1] or q[2] is not k[2]:
        return False
    node.args = (q[0], k[0], node.args[2], q[1], q[2], *node.args[5:])
    return True
