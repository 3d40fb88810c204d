"""What packed weights do not have: a gradient. They are for inference.

Asking for one through a packed module is an error when it is computed, not when a graph is compiled whose inputs could have one
(norms and embeddings around it are parameters), and never silence with nothing trained. Their operators are called without
recording, so that torch has nothing to warn of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from aerogel.errors import RunFailed


def inference_only(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`forward` of a module with packed weights: its result has no gradient in inputs or in the module's bias, and says so."""

    @functools.wraps(forward)
    def checked(module: Any, *given: Any, **named: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(module, *given, **named)
        with torch.no_grad():
            y = forward(module, *given, **named)
        inputs = (*given, *named.values(), getattr(module, "bias", None))
        asking = [one for one in inputs if isinstance(one, Tensor) and one.requires_grad]
        return torch.ops.aerogel.without_gradient.default(y, asking) if asking else y

    return checked


def _refuse(gradient: Tensor, shape: list[int], dtype: torch.dtype) -> NoReturn:
    raise RunFailed(
        "a gradient was asked for through a packed weight, which has none: run inference under torch.no_grad(), or train the"
        " dense checkpoint and compress it again"
    )


def _keep(ctx: Any, inputs: tuple[Tensor, list[Tensor]], output: Tensor) -> None:
    ctx.kinds = [(one.shape, one.dtype) for one in inputs[1]]


def _backward(ctx: Any, gradient: Tensor) -> tuple[None, list[Tensor]]:
    return None, [torch.ops.aerogel.refuse_gradient.default(gradient, *kind) for kind in ctx.kinds]


_library = torch.library.Library("aerogel", "FRAGMENT")  # type: ignore[no-untyped-call]
for _schema, _function, _fake in (
    (
        "without_gradient(Tensor y, Tensor[] inputs) -> Tensor",
        lambda y, inputs: y.clone(),
        lambda y, inputs: torch.empty_like(y),
    ),
    (
        "refuse_gradient(Tensor gradient, SymInt[] shape, ScalarType dtype) -> Tensor",
        _refuse,
        lambda gradient, shape, dtype: gradient.new_empty(shape, dtype=dtype),
    ),
):
    _name = _schema.partition("(")[0]
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    _library.impl(_name, _function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"aerogel::{_name}", _fake, lib=_library)
torch.library.register_autograd("aerogel::without_gradient", _backward, setup_context=_keep, lib=_library)
