"""Sees every product of a block with a weight that we know, whoever computes it.

Module hooks miss what modern models do: experts live in 3-D parameters, Conv1D multiplies the other way round, some
mixers call `F.linear` on a weight that belongs to another module. A `TorchFunctionMode` sits below all of that. A product
is recognised by the storage of its weight, so `experts.gate_up_proj[e]`, `weight.T` and `weight` itself are all found,
and an architecture needs no entry anywhere.

Two uses. `trace` runs a block once and follows data dependence: each tensor carries the number of known products it went
through, which sorts the products into waves. `Tape` runs it again and again while linears are compressed, hands inputs to
a collector, and returns remembered outputs for products that are already final.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Slot = tuple[str, int | None]
"""A known weight: the parameter's name, and which expert of a 3-D parameter."""

ATTENTION = "(attention)"
"""The name under which a tape asks for remembered results of attention, which costs more than a linear at length. No module
can be called that."""

_LINEAR = {nn.functional.linear}
_MATMUL = {torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__}
_ATTENTION = {nn.functional.scaled_dot_product_attention}
_ADDED = {torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm}


@dataclass(frozen=True, slots=True)
class Product:
    """One call `x @ w`: the weights it used and the input of each, [..., K]."""

    slots: tuple[Slot, ...]
    inputs: tuple[Tensor, ...]


class Weights:
    """The parameters to recognise, by the address of their storage; `parameters` maps the name to use for each to it."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.by_address = {value.untyped_storage().data_ptr(): (name, value) for name, value in parameters.items()}

    def product(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Product | None:
        """What `function(*args)` multiplies, if that is a product with a known weight."""
        if function in _LINEAR:
            pair = (args[0] if args else kwargs["input"], args[1] if len(args) > 1 else kwargs["weight"])
        elif function in _MATMUL and len(args) == 2:
            pair = (args[0], args[1])
        elif function in _ADDED and len(args) == 3:
            pair = (args[1], args[2])
        else:
            return None
        x, w = pair
        if not isinstance(w, Tensor) or w.is_meta:
            return None
        found = self.by_address.get(w.untyped_storage().data_ptr())
        if found is None:
            return None
        name, parameter = found
        if parameter.ndim < 3:
            return Product(((name, None),), (x,))
        first = (w.storage_offset() - parameter.storage_offset()) // parameter.stride(0)
        if w.ndim < 3:
            return Product(((name, first),), (x,))
        return Product(tuple((name, first + e) for e in range(w.shape[0])), tuple(x[e] for e in range(w.shape[0])))


@dataclass
class Trace:
    """What one run of a block shows.

    waves: slots without the expert number -> how many known products its input went through at most.
    shared: parameter -> the parameter that stands for it because both multiply the very same tensor.
    attention: for each call of attention, how many known products its inputs went through at most.
    """

    waves: dict[str, int] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    attention: list[int] = field(default_factory=list)


class _Tracer(TorchFunctionMode):
    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.weights, self.trace = weights, Trace()
        self.first_user: dict[int, str] = {}
        self.alive: list[Tensor] = []  # keeps addresses from being used twice while the trace runs

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        depth = max((getattr(t, "_wave", 0) for t in _tensors((args, kwargs))), default=0)
        product = self.weights.product(func, args, kwargs)
        if func in _ATTENTION:
            self.trace.attention.append(depth)
        if product is not None:
            for (name, _), x in zip(product.slots, product.inputs, strict=True):
                self.trace.waves[name] = max(depth, self.trace.waves.get(name, 0))
                if name not in self.trace.shared:
                    self.trace.shared[name] = self.first_user.setdefault(x.data_ptr(), name)
                    self.alive.append(x)
            depth += 1
        if depth:
            for t in _tensors(result):
                t._wave = depth  # type: ignore[attr-defined]
            name = getattr(func, "__name__", "")
            # What writes into its first argument passes its depth on to it.
            if args and isinstance(args[0], Tensor) and (name == "__setitem__" or (name.endswith("_") and name[-2:] != "__")):
                args[0]._wave = max(depth, getattr(args[0], "_wave", 0))  # type: ignore[attr-defined]
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def trace(weights: Weights, run: Callable[[], Tensor]) -> tuple[Trace, Tensor]:
    """Waves and shared inputs of the known weights, from one call of `run`; and what that call returned."""
    with torch.no_grad(), _Tracer(weights) as tracer:
        result = run()
    return tracer.trace, result


class Finished(Exception):  # noqa: N818  (not an error: it ends a run of a block that has shown all it had to show)
    """Raised through a block's forward once every input that was asked for has been seen."""


class Tape(TorchFunctionMode):
    """Runs inside a block's forward: collects inputs of the wanted weights, answers products that are final from memory.

    Args:
        weights: the known weights.
        collect: called with each wanted slot and its input [..., K].
        wanted: parameters whose inputs are collected.
        stop_after: parameters after whose collection the forward may stop (empty: never stops early).
        remember: asked for the output of every known product, and of attention under the name `ATTENTION`:
            (parameter, how often it was used before, how to compute it).
    """

    def __init__(
        self,
        weights: Weights,
        collect: Callable[[Slot, Tensor], None],
        wanted: frozenset[str],
        *,
        stop_after: frozenset[str] = frozenset(),
        remember: Callable[[str, int, Callable[[], Tensor]], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.weights, self.collect, self.wanted = weights, collect, wanted
        self.left = set(stop_after)
        self.remember = remember
        self.uses: dict[str, int] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        product = self.weights.product(func, args, kwargs)
        if product is None:
            return self._answer(ATTENTION, func, args, kwargs) if func in _ATTENTION else func(*args, **kwargs)
        name = product.slots[0][0]
        if name in self.wanted:
            for slot, x in zip(product.slots, product.inputs, strict=True):
                self.collect(slot, x)
            if name in self.left:
                self.left.discard(name)
                if not self.left:
                    raise Finished
        return self._answer(name, func, args, kwargs)

    def _answer(self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if self.remember is None:
            return func(*args, **kwargs)
        use = self.uses.get(name, 0)
        self.uses[name] = use + 1
        return self.remember(name, use, lambda: func(*args, **kwargs))
