"""CPU kernels as operators of torch, which a graph that is being compiled can hold; they know what they read by its address."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from aerogel.kernels.problem import Layout

Product = Callable[..., Tensor]
"""(x_MK, layout, bias_N or None, N, *whole numbers) -> y [M, N] in x's dtype, in new memory."""

_library = torch.library.Library("aerogel", "FRAGMENT")  # type: ignore[no-untyped-call]


def operator(name: str, tensors: Sequence[str], product: Product) -> Product:
    """`product`, which goes through `aerogel::name` while a graph is being compiled, and is called as it is otherwise.

    tensors: what it reads of a layout; not all of them need be there.
    """
    known = ", ".join(f"Tensor? {tensor}" for tensor in tensors)
    _library.define(f"{name}(Tensor x, {known}, Tensor? bias, SymInt N, int[] numbers) -> Tensor")  # type: ignore[no-untyped-call]

    def on_cpu(x_MK: Tensor, *given: Any) -> Tensor:
        *held, bias_N, N, numbers = given
        layout = {tensor: found for tensor, found in zip(tensors, held, strict=True) if found is not None}
        return product(x_MK, layout, bias_N, N, *numbers)

    def fake(x_MK: Tensor, *given: Any) -> Tensor:
        return x_MK.new_empty(x_MK.shape[0], given[-2])

    _library.impl(name, on_cpu, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"aerogel::{name}", fake, lib=_library)
    compiled = getattr(torch.ops.aerogel, name).default

    def run(x_MK: Tensor, layout: Layout, bias_N: Tensor | None, N: int, *numbers: int) -> Tensor:
        if not torch.compiler.is_compiling():
            return product(x_MK, layout, bias_N, N, *numbers)
        y_MN: Tensor = compiled(x_MK, *(layout.get(tensor) for tensor in tensors), bias_N, N, list(numbers))
        return y_MN

    return run
