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

from aerogel.kernels.decode import native_ops
from aerogel.kernels.native import library

NAME = "sdpa"
IGNORED = frozenset({"dropout", "scaling", "is_causal", "sliding_window", "position_ids", "use_cache", "cache_position"})
"""Options that change nothing where there is no mask, or are looked at here."""

Attention = Callable[..., tuple[Tensor, Tensor | None]]


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
    """Whether `attend` does these: several tokens of what `native_ops.prompt_fits` describes."""
    return native_ops.prompt_fits(q, k, v) and q.shape[2] > 1


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T, causal) v of tensors that `fits` accepts: [B, T, H, E] in their dtype, sums in float32."""
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
    arguments = native_ops.prompt_arguments(out, q, k, v, scale)
    library.check(library.library().aerogel_native_prompt(ctypes.byref(arguments)), f"attention of {q.shape[2]} tokens")
    return out
