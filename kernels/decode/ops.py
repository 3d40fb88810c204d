"""The small operations between the matmuls of a decode step, each in one launch, and what they mean in plain torch.

A step has about forty small operations per layer, each of which reads and writes a few kilobytes: on a GPU they cost two
microseconds each for nothing, on a CPU as much for the interpreter. Five operations do all of it:

    attend        rotates q and k, puts k and v into their slots, attends over the filled slots
                  q' = q cos + rot(q) sin,  o = sum_s softmax_s(scale q' k_s) v_s,  s in [max(start, n-window+1), n]
    add_rms_norm  h = a + b,  y = w h / sqrt(mean(h^2) + eps)
    rms_norm      y = w x / sqrt(mean(x^2) + eps)
    gate          y = act(g) u,  act = silu or gelu
    rotate        q' = q cos + rot(q) sin, where a prompt is read (`reading`)

They round where the model's own code rounds (every product of a rotation, the activation before the product), so that
greedy tokens stay the same. The functions here are the definition, and what runs where there is nothing better; the
dispatcher picks `triton_ops` on CUDA and `native` on the CPU. Attention merges the parts of a softmax as in
FlashDecoding (Dao et al. 2023); the norm is RMSNorm (Zhang, Sennrich 2019), the rotation RoPE (Su et al. 2021).

Shape legend: B sequences, H query heads, J key/value heads (H / J share one), L slots, D and E sizes of keys and values,
M tokens, N features.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from aerogel.kernels import triton_here
from aerogel.kernels.native import library
from aerogel.lazy import load

SCHEMAS = {
    "attend": "(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor(a!) keys, Tensor(b!) values, Tensor slot,"
    " Tensor start, float scale, int window, float softcap, Tensor? sinks) -> Tensor",
    "add_rms_norm": "(Tensor a, Tensor b, Tensor weight, float eps, bool round_first) -> (Tensor, Tensor)",
    "rms_norm": "(Tensor x, Tensor weight, float eps, bool round_first) -> Tensor",
    "gate": "(Tensor g, Tensor u, str act) -> Tensor",
    "rotate": "(Tensor x, Tensor cos, Tensor sin) -> Tensor",
}
"""Operators in the namespace `aerogel`, as torch.library wants them."""


def rotate(x: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    """x [B, H, T, D] turned by the angles of its positions, [B, T, D] or [1, T, D]: x cos + [-x2, x1] sin."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos_BTD[:, None] + turned * sin_BTD[:, None]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    keys: Tensor,
    values: Tensor,
    slot: Tensor,
    start: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """One token of attention for each sequence, [B, 1, H, E].

    Args:
        q, k, v: [B, H, 1, D], [B, J, 1, D], [B, J, 1, E], not yet rotated where `cos` is given.
        cos, sin: [B, 1, D] or [1, 1, D], or None.
        keys, values: the slots [B, J, L, D] and [B, J, L, E]; the new key and value are written at `slot`.
        slot: int64 [1]. start: int64 [B], the first slot of each sequence.
        scale: of the scores. window: how many slots count, 0 for all. softcap: c tanh(score / c), 0 for none.
        sinks: [H], scores of an extra key without value, or None.
    """
    if cos is not None and sin is not None:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    keys.index_copy_(2, slot, k)
    values.index_copy_(2, slot, v)
    end = int(slot) + 1
    first = max(int(start.min()), end - window if window else 0)
    near_k, near_v = keys[:, :, first:end], values[:, :, first:end]
    padded = len(start) > 1 and bool((start > first).any())
    mask = (torch.arange(first, end, device=q.device)[None] >= start[:, None])[:, None, None] if padded else None
    B, J, G = q.shape[0], k.shape[1], q.shape[1] // k.shape[1]
    grouped = q.reshape(B, J, G, q.shape[-1])  # the heads that share a key stand where queries of a longer prompt would
    if not softcap and sinks is None:
        o = torch.nn.functional.scaled_dot_product_attention(grouped, near_k, near_v, attn_mask=mask, scale=scale)
    else:
        scores = (grouped.float() @ near_k.float().transpose(2, 3)) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.float().reshape(1, J, G, 1).expand(B, -1, -1, 1)], -1)
        weights = torch.softmax(scores, -1)[..., : end - first]
        o = (weights @ near_v.float()).to(q.dtype)
    return o.reshape(B, 1, J * G, v.shape[-1])


def rms_norm(x: Tensor, weight: Tensor, eps: float, round_first: bool) -> Tensor:
    """x [..., N] over its root mean square, times weight [N]; `round_first` to x's dtype before the product."""
    wide = x.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * y.to(x.dtype) if round_first else (y * weight.float()).to(x.dtype)


def add_rms_norm(a: Tensor, b: Tensor, weight: Tensor, eps: float, round_first: bool) -> tuple[Tensor, Tensor]:
    """(a + b, its rms_norm)."""
    h = a + b
    return h, rms_norm(h, weight, eps, round_first)


def gate(g: Tensor, u: Tensor, act: str) -> Tensor:
    """act(g) * u, any shape. act: "silu", "gelu" or "gelu_tanh"."""
    if act == "silu":
        return torch.nn.functional.silu(g) * u
    return torch.nn.functional.gelu(g, approximate="tanh" if act == "gelu_tanh" else "none") * u


def _like_q(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    return q.new_empty(q.shape[0], 1, q.shape[1], v.shape[-1])


FAKES: dict[str, Any] = {
    "attend": _like_q,
    "add_rms_norm": lambda a, b, *rest: (torch.empty_like(a), torch.empty_like(a)),
    "rms_norm": lambda x, *rest: torch.empty_like(x),
    "gate": lambda g, u, act: torch.empty_like(g, memory_format=torch.contiguous_format),
    "rotate": lambda x, cos, sin: x.new_empty(len(x), x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2),
}
COMPILED = frozenset({"attend", "add_rms_norm", "rms_norm", "gate"})
"""Those that the compiled CPU library has."""


def missing(device: torch.device) -> str | None:
    """Why these operations cannot run on a device, or None."""
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"they are written for CPU and CUDA, not for {device.type}"
    return triton_here.missing()


def _on_cuda(name: str) -> Any:
    def run(*args: Any) -> Any:
        return load(f"aerogel.kernels.decode.triton_ops:{name}")(*args)

    return run


def on_cpu(name: str) -> Any:
    """The compiled version where there is one, found when it is first called."""
    chosen: list[Any] = []

    def run(*args: Any) -> Any:
        if not chosen:
            compiled = name in COMPILED and library.missing() is None
            chosen.append(load(f"aerogel.kernels.decode.native_ops:{name}") if compiled else globals()[name])
        return chosen[0](*args)

    return run


def _register() -> None:
    for name, schema in SCHEMAS.items():
        torch.library.define(f"aerogel::{name}", schema)
        torch.library.impl(f"aerogel::{name}", "CPU", on_cpu(name))
        torch.library.impl(f"aerogel::{name}", "CUDA", _on_cuda(name))
        torch.library.register_fake(f"aerogel::{name}", FAKES[name])


_register()
