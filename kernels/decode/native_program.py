"""A traced decode step as a list of compiled CPU operations: one call runs them all.

On a CPU a step of a small model is bound by what lies between the matmuls: three hundred calls from Python, each of which
looks up a dozen addresses. But every tensor of a step has the same shape at every step, so each gets its place in memory
once, its operation becomes a C struct with those addresses, and the whole run of structs is handed over at once.

    packed linears and embeddings, norms, gates, attention                an entry of a native run
    views                                                                nothing: they were taken once, of the same memory
    everything else (a dense embedding or head, angles)                  called from Python between two runs, result copied

What cannot be treated so (an operator that writes into its argument, a tensor that moves) refuses with the reason, and the
step runs as the plain function it was. The result is the same memory at every step and is handed out as a copy.
"""

from __future__ import annotations

from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from aerogel.kernels.decode import native_ops
from aerogel.kernels.decode.operations import Operations
from aerogel.kernels.decode.trace import CannotTrace, Seen
from aerogel.kernels.embedding import PackedEmbedding
from aerogel.kernels.linear import Linear
from aerogel.kernels.native import library

_OWN = {getattr(torch.ops.aerogel, name).default: name for name in ("attend", "add_rms_norm", "rms_norm", "gate")}
FEWEST = 8
"""Native operations below which the plain function is as good."""


class NativeProgram:
    """A step made from a traced, fused graph. Call it with the tensors it was traced with.

    operators: native operations; calls: how many times a step goes through Python for something.

    Raises:
        CannotTrace: the graph holds something that has no fixed place, or hardly anything that is native.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        if library.missing():
            raise CannotTrace(f"the compiled CPU library {library.missing()}")
        self._inputs: list[Tensor] = []
        self._known: dict[fx.Node, Any] = {}
        self._operations = Operations()
        for node in graph.graph.nodes:
            self._add(graph, node)
        self.operators, self.calls = self._operations.count, self._operations.calls
        if self.operators < FEWEST:
            raise CannotTrace(f"only {self.operators} operations of the step are native")

    def __call__(self, *arguments: Tensor) -> Tensor:
        """The step's result, in new memory."""
        for place, given in zip(self._inputs, arguments, strict=True):
            place.copy_(given)
        self._operations.run()
        return self._result.clone()

    def _add(self, graph: fx.GraphModule, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._known[node] = _place(node)
            self._inputs.append(self._known[node])
        elif node.op == "get_attr":
            self._known[node] = getattr(graph, str(node.target))
        elif node.op == "output":
            self._result: Tensor = self._known[node.args[0]]  # type: ignore[index]
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda each: self._known[each])
            self._known[node] = self._operation(node, args, kwargs)

    def _operation(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Where the node's result lies; makes the operation that puts it there."""
        target: Any = node.target
        if target is getitem:
            return args[0][args[1]]
        module = getattr(target, "module", None) or getattr(target, "__self__", None)
        if isinstance(module, Linear | PackedEmbedding):
            y = _place(node)
            add: Any = self._operations.linear if isinstance(module, Linear) else self._operations.rows
            return y if add(module, args[0], y) else self._python(node, args, kwargs)
        if target in _OWN:
            result = getattr(self, f"_{_OWN[target]}")(node, *args, **kwargs)
            return result if result is not None else self._python(node, args, kwargs)
        schema = getattr(target, "_schema", None)
        if schema is not None and (target.is_view or str(target) == "aten._unsafe_view.default"):
            return target(*args, **kwargs)
        if schema is not None and schema.is_mutable:
            raise CannotTrace(f"{target} writes into its argument")
        return self._python(node, args, kwargs)

    def _python(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        target: Any = node.target
        if any(user.target is getitem for user in node.users):
            raise CannotTrace(f"{target} has several results")
        place = _place(node)
        self._operations.call(lambda: place.copy_(target(*args, **kwargs)))
        return place

    def _rms_norm(self, node: fx.Node, x: Tensor, weight: Tensor, eps: float, round_first: bool) -> Tensor | None:
        if not native_ops.norm_fits(x, None, weight):
            return None
        y = _place(node)
        self._operations.add("norm", native_ops.norm_arguments(x, None, weight, None, y, eps, round_first), None, x, weight, y)
        return y

    def _add_rms_norm(
        self, node: fx.Node, a: Tensor, b: Tensor, weight: Tensor, eps: float, round_first: bool
    ) -> tuple[Tensor, Tensor] | None:
        if not native_ops.norm_fits(a, b, weight):
            return None
        total, y = torch.empty_like(a), torch.empty_like(a)
        arguments = native_ops.norm_arguments(a, b, weight, total, y, eps, round_first)
        self._operations.add("norm", arguments, None, a, b, weight, total, y)
        return total, y

    def _gate(self, node: fx.Node, g: Tensor, u: Tensor, act: str) -> Tensor | None:
        y = _place(node)
        arguments = native_ops.gate_arguments(g, u, act, y)
        if arguments is None:
            return None
        self._operations.add("gate", arguments, None, g, u, y)
        return y

    def _attend(self, node: fx.Node, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor | None:
        out = torch.empty(q.shape[0], 1, q.shape[1], v.shape[-1], dtype=q.dtype)
        arguments = native_ops.attend_arguments(out, q, k, v, *rest)
        if arguments is None:
            raise CannotTrace("its attention is not one that is compiled")
        self._operations.add("attend", arguments, None, q, k, v, rest, out)
        return out


def _place(node: fx.Node) -> Tensor:
    """Memory for the node's result, as it was seen."""
    seen = node.meta.get("seen")
    if not isinstance(seen, Seen):
        raise CannotTrace(f"{node.target} has a result of no fixed shape")
    return torch.empty_strided(seen.shape, seen.strides, dtype=seen.dtype)
