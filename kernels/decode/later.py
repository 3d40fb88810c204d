"""A norm or a gate that is not computed until somebody asks: a matmul of 8-bit activations rounds it where it is made.

`Later` stands for the tensor. Linears bring their input into rows and hand it to an operator: on that way it stays what it is,
an operator for 8-bit activations takes `made` instead (`gemm/cuda_made.py`), and whatever else is asked of it, by anybody,
sees the computed tensor. What it is made from must not change before that: nobody may write into a norm's input while its
output waits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from aerogel.kernels.gemm import cuda_fp8, cuda_int8
from aerogel.kernels.gemm.cuda_made import Made

SHAPES = frozenset({Tensor.reshape, Tensor.view})
"""What may give the same rows in another shape."""


class Later(Tensor):
    """The tensor that `made` describes, in some shape [..., K]; never has values of its own."""

    made: Made

    @classmethod
    def of(cls, made: Made, shape: torch.Size) -> Later:
        """In this shape, whose last dimension is K."""
        return cls._standing_for(made, made.x.as_strided(shape, (0,) * len(shape)))

    @classmethod
    def _standing_for(cls, made: Made, like: Tensor) -> Later:
        found = like.as_subclass(cls)
        found.made = made
        return found

    def settled(self) -> Tensor:
        """The computed tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            shape = tuple(self.shape)
        return self.made.settled().reshape(shape)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any use of it."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":  # shape, dtype, device
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args)
        first = args[0] if args else None
        if isinstance(first, cls) and not kwargs:
            if func is torch.ops.aerogel.tiles_linear_int8.default:
                return cuda_int8.tiles_linear_int8(first.made, *args[1:])
            if func is torch.ops.aerogel.fp8_linear.default:
                return cuda_fp8.fp8_linear(first.made, *args[1:])
            same = first._as_rows(func, args[1:])
            if same is not None:
                return same
        args, kwargs = tree_map(lambda held: held.settled() if isinstance(held, cls) else held, (args, kwargs))
        return func(*args, **kwargs)

    def _as_rows(self, func: Any, args: tuple[Any, ...]) -> Later | None:
        """func(x, ...) where that is still the same rows, else None."""
        if func is Tensor.contiguous or (func is Tensor.to and args == (self.dtype,)):
            return self
        if func not in SHAPES:
            return None
        with torch._C.DisableTorchFunctionSubclass():
            found = func(self, *args)  # all strides are 0, so nothing is copied
            rows = found.shape[-1:] == self.shape[-1:]
        return self._standing_for(self.made, found) if rows else None
