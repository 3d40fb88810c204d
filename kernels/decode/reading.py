"""Reading a prompt with fewer passes over memory: norms, gates and rotations as one kernel each, wherever a model has them.

A prompt of 2048 tokens spends a third of its time in small operations: a norm is six passes over the hidden states, a gate
two, a rotation ten. A step of decoding is traced and rewritten (`fuse`), but a trace costs more than a prompt is worth, so
here the model runs as it is, with three kinds of its parts replaced while it reads:

    norms        modules with one vector of weights     ->  aerogel::rms_norm
    activations  silu, gelu: wait for the product       ->  aerogel::gate        (`Awaiting`)
    rotations    the function that turns q and k        ->  aerogel::rotate

Where linears of a norm's or a gate's width round their inputs to int8, what it makes waits for them (`later`) and is rounded
where it is made.

Nothing is known of architectures. What a part computes is found by experiment: it is given a few random numbers, and only
where its answer is that of the operator, rounding included, is it replaced.

Shape legend: B sequences, H heads, T tokens, D size of a head, N features.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from aerogel.kernels.decode import ops
from aerogel.kernels.decode.later import Later
from aerogel.kernels.gemm.cuda_int8 import FEW_TOKENS
from aerogel.kernels.gemm.cuda_made import Gated, Normed
from aerogel.kernels.linear import Linear

ROTATION = "apply_rotary_pos_emb"
"""The name under which model files of transformers hold their rotation."""
EPSILONS = ("variance_epsilon", "eps")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
ACTIVATION_MODULES = ("torch.nn.modules.activation", "transformers.activations")
PRODUCTS = frozenset({torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__})
ROUNDING = ("cuda-int8", "cuda-fp8")
"""The kernels of linears that round what they are given, and take it from where it is made."""
SAME = 1e-4
"""Relative distance up to which two answers are the same: a rounding at another place makes ten times as much in 16 bits."""

Forward = Callable[[Tensor], Tensor]
Rotate = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Parts:
    """What can be replaced in a model. forwards: of its norms and activations. rotations: by the file that holds them."""

    forwards: dict[nn.Module, Forward] = field(default_factory=dict)
    rotations: dict[ModuleType, Rotate] = field(default_factory=dict)

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """The model reads with our operators inside."""
        kept = {file: getattr(file, ROTATION) for file in self.rotations}
        try:
            for module, forward in self.forwards.items():
                module.forward = forward
            for file, rotation in self.rotations.items():
                setattr(file, ROTATION, rotation)
            yield
        finally:
            for module in self.forwards:
                vars(module).pop("forward", None)
            for file, rotation in kept.items():
                setattr(file, ROTATION, rotation)


@torch.no_grad()
def parts_of(model: nn.Module) -> Parts:
    """Every part of the model that our operators compute as it does."""
    leaves = [module for module in model.modules() if not any(module.children()) and "forward" not in vars(module)]
    widths = frozenset(
        module.in_features for module in model.modules() if isinstance(module, Linear) and module.kernel_name in ROUNDING
    )
    found = ((module, _norm(module, widths) or _activation(module, widths)) for module in leaves)
    forwards = {module: forward for module, forward in found if forward is not None}
    files = {sys.modules[type(module).__module__] for module in model.modules()}
    rotations = {file: rotation for file in files if (rotation := _rotation(getattr(file, ROTATION, None))) is not None}
    return Parts(forwards, rotations)


def _same(found: Tensor, wanted: Tensor) -> bool:
    return found.dtype == wanted.dtype and bool((found - wanted).float().norm() <= SAME * wanted.float().norm())


def _norm(module: nn.Module, widths: frozenset[int]) -> Forward | None:
    """The module's forward as `rms_norm`, or None for anything that is no such norm."""
    held = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    weight_N = held.get("weight")
    eps = next((value for name in EPSILONS if isinstance(value := getattr(module, name, None), float)), None)
    if len(held) != 1 or weight_N is None or weight_N.dim() != 1 or eps is None or weight_N.is_meta:
        return None
    if len(inspect.signature(module.forward).parameters) != 1:
        return None
    x_2N = torch.randn(2, len(weight_N), generator=torch.Generator().manual_seed(0)).to(weight_N.device, weight_N.dtype)
    found_2N = module(x_2N)
    for factor_N in (weight_N.detach(), 1 + weight_N.detach().float()):
        for round_first in (True, False):
            if _same(found_2N, ops.rms_norm(x_2N, factor_N, eps, round_first)):
                return _normed(module, factor_N, eps, round_first, widths)
    return None


def _normed(module: Any, factor_N: Tensor, eps: float, round_first: bool, widths: frozenset[int]) -> Forward:
    plain: Forward = type(module).forward.__get__(module)
    dtype, N = module.weight.dtype, len(factor_N)

    def forward(x: Tensor) -> Tensor:
        if x.dtype != dtype:
            return plain(x)
        if N in widths and x.numel() > FEW_TOKENS * N:
            return Later.of(Normed(x.reshape(-1, N), factor_N, eps, round_first), x.shape)
        y: Tensor = torch.ops.aerogel.rms_norm.default(x, factor_N, eps, round_first)
        return y

    return forward


def _activation(module: nn.Module, widths: frozenset[int]) -> Forward | None:
    """A forward whose result waits for the product behind it, or None for anything but an activation that `gate` has."""
    if type(module).__module__ not in ACTIVATION_MODULES or module.state_dict():
        return None
    if len(inspect.signature(module.forward).parameters) != 1:
        return None
    x = torch.linspace(-6, 6, 97)
    one, found = torch.ones_like(x), module(x)
    act = next((act for act in ACTIVATIONS if torch.allclose(found, ops.gate(x, one, act), rtol=1e-6, atol=1e-6)), None)
    if act is None:
        return None
    plain: Forward = type(module).forward.__get__(module)
    return lambda g: Awaiting.of(g, act, plain, widths)


class Awaiting(Tensor):
    """g, of which act(g) is wanted: `act(g) * u` becomes one kernel, and whatever else is asked of it sees act(g)."""

    act: str
    plain: Forward
    widths: frozenset[int]

    @classmethod
    def of(cls, g: Tensor, act: str, plain: Forward, widths: frozenset[int] = frozenset()) -> Awaiting:
        """act(g), not computed yet; its products neither where they are of one of these widths."""
        found = g.as_subclass(cls)
        found.act, found.plain, found.widths = act, plain, widths
        return found

    def times(self, u: Tensor) -> Tensor:
        """act(g) * u."""
        g, N = _bare(self), u.shape[-1]
        if N in self.widths and u.numel() > FEW_TOKENS * N:
            return Later.of(Gated(g.reshape(-1, N), u.reshape(-1, N), self.act), u.shape)
        y: Tensor = torch.ops.aerogel.gate.default(g, u, self.act)
        return y

    def settled(self) -> Tensor:
        """act(g)."""
        return self.plain(_bare(self))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any use of it."""
        if getattr(func, "__name__", "") == "__get__":  # shape, dtype, device: the same before and after
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args)
        if func in PRODUCTS and len(args) == 2 and not kwargs:
            for active, u in (args, args[::-1]):
                if isinstance(active, cls) and not isinstance(u, cls) and isinstance(u, Tensor):
                    g = _bare(active)
                    if (g.shape, g.dtype, g.device) == (u.shape, u.dtype, u.device):
                        return active.times(u)
        args, kwargs = tree_map(lambda held: held.settled() if isinstance(held, cls) else held, (args, kwargs or {}))
        return func(*args, **kwargs)


def _bare(awaiting: Awaiting) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return awaiting.as_subclass(Tensor)


def _rotation(plain: Any) -> Rotate | None:
    """A rotation by `rotate`, or None where `plain` is no function (q, k, cos, sin, ...) that turns both that way."""
    if not callable(plain) or list(inspect.signature(plain).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return None
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 3, 8, generator=generator), torch.randn(1, 2, 3, 8, generator=generator)
    cos, sin = torch.randn(2, 1, 3, 8, generator=generator)
    try:
        found = plain(q, k, cos, sin)
    except RuntimeError:  # it takes angles of another shape, so it is another rotation
        return None
    if not all(_same(turned, ops.rotate(x, cos, sin)) for turned, x in zip(found, (q, k), strict=True)):
        return None

    def rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **more: Any) -> tuple[Tensor, Tensor]:
        usual = not rest and not more and cos.dim() == 3 and all(x.dim() == 4 and x.dtype == cos.dtype for x in (q, k))
        if not usual or any(x.shape[2:] != cos.shape[1:] for x in (q, k)):
            found: tuple[Tensor, Tensor] = plain(q, k, cos, sin, *rest, **more)
            return found
        turn = torch.ops.aerogel.rotate.default
        return turn(q, cos, sin), turn(k, cos, sin)

    return rotation
