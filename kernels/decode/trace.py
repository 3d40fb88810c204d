"""One decode step as a flat list of operators.

A model's step is thousands of Python calls around a few hundred operators: modules call modules, shapes are looked up,
masks are built and thrown away. None of that changes from step to step. So the step is run once under a
`TorchDispatchMode`, which sits below everything and sees nothing but operators and the tensors they take; what only looks
at weights differently (a transpose) is kept as it was seen; `fuse` replaces the small operators by fewer; and what
remains runs as one Python function, or is captured in a CUDA graph. (`make_fx` would do the same, and keeps fake tensors
and tracebacks for every operator, which takes seconds where this takes tenths.)

A trace is right only if nothing in the step depends on values: operators whose output shape depends on data are refused,
and so is Python code that asks a tensor for a number. Which tokens a step is given, at which slot, are arguments. The
caller compares the program with the model on another token before trusting it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import getitem
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

SMALL = 1 << 14
"""Results of at most this many elements that depend on weights alone are kept from the trace."""


@dataclass(frozen=True)
class Seen:
    """What a rewrite may know of a traced tensor. strides: in elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Seen:
        """The tensor's."""
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)


class CannotTrace(Exception):  # noqa: N818  (not an error of the run: the loop then goes another way and says why)
    """Why a step cannot be traced."""


class Program:
    """A traced step: call it with the tensors it was traced with. `operators` counts what it launches, views left out."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self.graph = graph
        names = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
        # Attributes of a plain object are found ten times faster than those of a module.
        self._weights = SimpleNamespace(**{name: getattr(graph, name) for name in names})
        self._run: Callable[..., Tensor] = type(graph).forward
        self.operators = sum(_works(node) for node in graph.graph.nodes)

    def __call__(self, *arguments: Tensor) -> Tensor:
        """The step's result."""
        return self._run(self._weights, *arguments)


def _works(node: fx.Node) -> bool:
    target = node.target
    if node.op != "call_function" or target is getitem:
        return False
    return not (isinstance(target, torch._ops.OpOverload) and _is_view(target))


def _is_view(op: torch._ops.OpOverload) -> bool:
    schema = op._schema
    return op.is_view or str(op) == "aten._unsafe_view.default" or (schema.name == "aten::detach")


class _Recorder(TorchDispatchMode):  # type: ignore[misc, unused-ignore]
    """Writes every operator into a graph. Tensors it has not seen being made are weights."""

    def __init__(self, arguments: tuple[Tensor, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.graph, self.root = fx.Graph(), nn.Module()
        # Tensors are held as long as their addresses stand for nodes.
        self.nodes: dict[int, tuple[Tensor, fx.Node]] = {}
        for index, tensor in enumerate(arguments):
            self._remember(tensor, self.graph.placeholder(f"argument_{index}"))

    def _remember(self, tensor: Tensor, node: fx.Node) -> None:
        node.meta = {"seen": Seen.of(tensor), "tensor": tensor}
        self.nodes[id(tensor)] = (tensor, node)

    def node_of(self, value: Any) -> Any:
        """The node that made a tensor, a new attribute for a weight, and anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self.nodes:
            name = f"weight_{len(self.nodes)}"
            self.root.register_buffer(name, value.detach() if isinstance(value, nn.Parameter) else value, persistent=False)
            self._remember(value, self.graph.get_attr(name))
        return self.nodes[id(value)][1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operator."""
        kwargs = kwargs or {}
        taken = fx.node.map_aggregate((args, kwargs), self.node_of)
        node = self.graph.create_node("call_function", func, *taken)
        if _depends_on_values(node):
            raise CannotTrace(f"{func} depends on values")
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self._remember(result, node)
        elif isinstance(result, list | tuple):
            for index, part in enumerate(result):
                if isinstance(part, Tensor):
                    self._remember(part, self.graph.call_function(getitem, (node, index)))
        return result

    def whole(self, run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """A forward that is one operator of the trace: what it calls may be no operator of torch."""

        def forward(x: Tensor) -> Tensor:
            with _disable_current_modes():
                result: Tensor = run(x)
            self._remember(result, self.graph.call_function(run, (self.node_of(x),)))
            return result

        return forward


def trace(
    step: Callable[..., Tensor], *arguments: Tensor, whole: Mapping[nn.Module, Callable[[Tensor], Tensor]] | None = None
) -> fx.GraphModule:
    """The operators of `step(*arguments)`, weights as attributes. Runs it once.

    Modules of `whole` are one operator each, which is the function beside them.

    Raises:
        CannotTrace: the step depends on values, or fails under the tracer, with what showed it.
    """
    recorder = _Recorder(arguments)
    modules: Mapping[Any, Callable[[Tensor], Tensor]] = whole or {}
    try:
        for module, run in modules.items():
            module.forward = recorder.whole(run)
        with torch.no_grad(), recorder:
            result = step(*arguments)
    except (CannotTrace, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # Foreign code may raise anything when it is given less than it is used to; the loop says so and goes another way.
        raise CannotTrace(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}") from error
    finally:
        for module in modules:
            vars(module).pop("forward", None)
    recorder.graph.output(recorder.node_of(result))
    _fold(recorder.graph, recorder.root)
    return fx.GraphModule(recorder.root, recorder.graph)


def _depends_on_values(node: fx.Node) -> bool:
    tags = getattr(node.target, "tags", ())
    if torch.Tag.dynamic_output_shape not in tags and torch.Tag.data_dependent_output not in tags:
        return False
    if node.target != torch.ops.aten.index.Tensor:
        return True
    given: Any = node.args[1]
    indices = [index for index in given if index is not None]
    return any(index.meta["seen"].dtype in (torch.bool, torch.uint8) for index in indices)


def _fold(graph: fx.Graph, root: nn.Module) -> None:
    """Keeps what depends on weights alone: views always, other results where they are small and nobody writes to them."""
    written = _written(graph)
    known: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.op == "get_attr":
            known.add(node)
        elif node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            value, sources = node.meta.get("tensor"), node.all_input_nodes
            if value is None or not known.issuperset(sources) or node.target._schema.is_mutable:
                continue
            touched = any(_address(tensor) in written for tensor in (value, *(source.meta["tensor"] for source in sources)))
            if not _is_view(node.target) and (value.numel() > SMALL or touched):
                continue
            root.register_buffer(f"kept_{node.name}", value, persistent=False)
            with graph.inserting_before(node):
                kept = graph.get_attr(f"kept_{node.name}")
            kept.meta = node.meta
            known.add(kept)
            node.replace_all_uses_with(kept)
    for node in graph.nodes:
        node.meta.pop("tensor", None)
    _weights_first(graph)


def _weights_first(graph: fx.Graph) -> None:
    """So that a rewrite may use a weight anywhere."""
    nodes = list(graph.nodes)
    anchor = next(node for node in nodes if node.op not in ("placeholder", "get_attr"))
    for node in nodes:
        if node.op == "get_attr":
            anchor.prepend(node)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _written(graph: fx.Graph) -> set[int]:
    """Storages that some operator writes to: slots, not weights."""
    found: set[int] = set()
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, fx.Node):
                    found.add(_address(value.meta["tensor"]))
    return found


def clean(graph: fx.GraphModule) -> None:
    """Drops what nobody uses and makes the code anew."""
    graph.graph.eliminate_dead_code(_must_stay)
    graph.delete_all_unused_submodules()
    graph.recompile()


def _must_stay(node: fx.Node) -> bool:
    if node.op in ("placeholder", "output"):
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
