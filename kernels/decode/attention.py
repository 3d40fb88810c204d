"""Our attention for one token, in the place where transformers looks for implementations of attention.

transformers' models do not call attention themselves: they look an implementation up by the name in their config. Ours is
registered as `aerogel_decode` and is only named there while a step runs (`attending`). transformers makes no mask for an
implementation it has no mask for, which is right: the slots say what may be seen.

A model that does not look its attention up never reaches us. That shows in the keys of its layers, which nobody takes:
`attending` then raises `NotOurs`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from aerogel.kernels.decode import ops as _ops  # noqa: F401  (defines the operators)
from aerogel.kernels.decode.slots import Mode, SlotCache

NAME = "aerogel_decode"
_CACHE: ContextVar[SlotCache] = ContextVar("aerogel_decode_cache")
_PLAIN = frozenset({"dropout", "scaling", "softcap", "s_aux", "sliding_window", "is_causal", "position_ids", "use_cache"})


class NotOurs(Exception):  # noqa: N818  (not an error of the run: the loop then goes another way and says why)
    """Why a model's attention cannot be ours."""


def decode_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """One token [B, H, 1, D] over the slots of the layer that has just been given `key` and `value`; [B, 1, H, E].

    Raises:
        NotOurs: for anything a plain attention does not have.
    """
    cache = _CACHE.get()
    layer, cache.pending = cache.pending, None
    strange = [name for name, found in options.items() if name not in _PLAIN and isinstance(found, Tensor)]
    if layer is None or attention_mask is not None or strange or key.shape[-2] != 1 or query.shape[1] % key.shape[1]:
        raise NotOurs(f"its attention wants {', '.join(strange) or 'a mask of its own'}")
    # Kernels write where they are told: a cache that holds something else than keys (latent ones, say) must not get there.
    for new, held in ((key, layer.keys), (value, layer.values)):
        if [*new.shape[:2], new.shape[3], new.dtype] != [*held.shape[:2], held.shape[3], held.dtype]:
            raise NotOurs(f"it attends to {list(new.shape)} and keeps {list(held.shape)} in its cache")
    scale = options.get("scaling")
    sizes = (query.shape[-1] ** -0.5 if scale is None else float(scale), layer.window or 0, float(options.get("softcap") or 0))
    state = cache.state
    given = (query, key, value, None, None, layer.keys, layer.values, state.slot_1, state.start_B)
    found: Tensor = torch.ops.aerogel.attend(*given, *sizes, options.get("s_aux"))
    return found, None


@contextmanager
def attending(model: PreTrainedModel, cache: SlotCache, mode: Mode) -> Iterator[None]:
    """Steps of `model` inside use the slots in `mode`; in mode "attend" with our attention."""
    if mode == "attend":
        ALL_ATTENTION_FUNCTIONS.register(NAME, decode_attention)
    configs: dict[int, Any] = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    named = {key: config._attn_implementation for key, config in configs.items()}
    token = _CACHE.set(cache)
    cache.mode, cache.pending = mode, None
    try:
        for config in configs.values() if mode == "attend" else ():
            config._attn_implementation = NAME
        yield
        if cache.pending is not None:
            raise NotOurs("it does not look its attention up")
    finally:
        for key, config in configs.items():
            config._attn_implementation = named[key]
        _CACHE.reset(token)
        cache.mode = "fill"
