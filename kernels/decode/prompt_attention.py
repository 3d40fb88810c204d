"""Our attention of a whole prompt on a CPU, in the place of torch's while a model reads.

Causal attention of 512 tokens takes torch's operator a quarter of the time that a small model reads them; compiled for the
purpose (kernels/native/prompt.h) it takes a fourth of that. It is put in where transformers looks its `sdpa` up, and hands
everything on to that but the plain case: no mask (which is how transformers says that every token sees all before it), no
dropout, sinks or cap, one type.

Shape legend: B sequences, H query heads, J key/value heads, T tokens, D and E sizes of keys and values.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from aerogel.kernels.native import library

NAME = "sdpa"
LARGEST_HEAD = 512
IGNORED = frozenset({"dropout", "scaling", "is_causal", "sliding_window", "position_ids", "use_cache", "cache_position"})
"""Options that change nothing where there is no mask, or are looked at here."""

Attention = Callable[..., tuple[Tensor, Tensor | None]]


class _Prompt(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_int64 * 3) for name in ("q_strides", "k_strides", "v_strides")),
        *((name, ctypes.c_int64) for name in ("batch", "queries", "heads", "tokens", "key_size", "value_size")),
        ("scale", ctypes.c_float),
        ("type", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]


@contextmanager
def reading() -> Iterator[None]:
    """Models inside that use `sdpa` read prompts with our attention, where the compiled library is there."""
    if library.missing() is not None:
        yield
        return
    plain: Attention = ALL_ATTENTION_FUNCTIONS[NAME]
    overridden = NAME in ALL_ATTENTION_FUNCTIONS._local_mapping
    ALL_ATTENTION_FUNCTIONS[NAME] = _in_place_of(plain)
    try:
        yield
    finally:
        if overridden:
            ALL_ATTENTION_FUNCTIONS[NAME] = plain
        else:
            ALL_ATTENTION_FUNCTIONS._local_mapping.pop(NAME)


def _in_place_of(plain: Attention) -> Attention:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        strange = [name for name, found in options.items() if name not in IGNORED and found is not None and found is not False]
        usual = attention_mask is None and causal and not options.get("dropout") and not strange
        if not usual or not fits(query, key, value):
            return plain(module, query, key, value, attention_mask, **options)
        scale = options.get("scaling")
        return attend(query, key, value, query.shape[-1] ** -0.5 if scale is None else float(scale)), None

    return attention


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the compiled code does these: q [B, H, T, D], k [B, J, T, D], v [B, J, T, E] on the CPU, rows contiguous."""
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or q.shape[2] < 2:
        return False
    B, H, T, D = q.shape
    J, E = k.shape[1], v.shape[3]
    on_cpu = all(x.device.type == "cpu" and x.stride(3) == 1 for x in (q, k, v))
    alike = on_cpu and q.dtype in library.TYPES and q.dtype == k.dtype == v.dtype
    shapes = k.shape == (B, J, T, D) and v.shape == (B, J, T, E)
    return alike and shapes and H % J == 0 and max(D, E) <= LARGEST_HEAD and q.numel() > 0


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T, causal) v of tensors that `fits` accepts: [B, T, H, E] in their dtype, sums in float32."""
    B, H, T, D = q.shape
    J, E = k.shape[1], v.shape[3]
    out = q.new_empty(B, T, H, E)
    strides = [(ctypes.c_int64 * 3)(*x.stride()[:3]) for x in (q, k, v)]
    arguments = _Prompt(
        *(x.data_ptr() for x in (q, k, v, out)),
        *strides,
        *(B, H, J, T, D, E),
        scale,
        library.TYPES[q.dtype],
        library.threads(),
    )
    library.check(library.library().aerogel_native_prompt(ctypes.byref(arguments)), f"attention of {T} tokens")
    return out
