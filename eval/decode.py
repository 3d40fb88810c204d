"""Greedy generation with a clock in it: how long the first token takes, and how long the others.

Shape legend: B sequences in a batch, T prompt tokens, R generated tokens.

Generation has two phases that a benchmark must not mix. Prefill runs the whole prompt through the model at once and is
bound by arithmetic; its end is the first token. Decode then runs one token per sequence at a time and is bound by the
bytes of weights read, which is what compression shrinks. The loop is plain: the model's own forward and transformers'
key/value cache, no sampling, no early stop, so two models do exactly the same number of steps.
"""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, StaticCache


@dataclass(frozen=True)
class Decoded:
    """tokens_BR: int64 [B, R]. first_seconds: prompt to first token. rest_seconds: the R-1 tokens after it."""

    tokens_BR: Tensor
    first_seconds: float
    rest_seconds: float


def _now(device: torch.device) -> float:
    """Wall clock in seconds, after everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _cache(model: PreTrainedModel, names: frozenset[str], positions: int, kind: str) -> dict[str, Any]:
    """The keyword argument that carries the cache into the first step; empty where the model makes its own."""
    if "past_key_values" not in names:
        return {}
    if kind == "static":
        return {"past_key_values": StaticCache(config=model.config, max_cache_len=positions)}
    return {"past_key_values": DynamicCache(config=model.config)}


def _carried(output: Any) -> dict[str, Any]:
    """The cache as the next step wants it: keys and values of attention, or the state of a state-space model."""
    return {name: output[name] for name in ("past_key_values", "cache_params") if output.get(name) is not None}


@torch.inference_mode()
def decode(model: PreTrainedModel, ids_BT: Tensor, new_tokens: int, cache: Literal["dynamic", "static"] = "dynamic") -> Decoded:
    """Generate `new_tokens` (at least 1) greedily for each prompt of `ids_BT` (int64 [B, T]), timing both phases."""
    device = model.device
    ids_BT = ids_BT.to(device)
    names = frozenset(inspect.signature(model.forward).parameters)
    keep = {"logits_to_keep": 1} if "logits_to_keep" in names else {}
    state = _cache(model, names, ids_BT.shape[1] + new_tokens, cache)
    start = _now(device)
    output = model(input_ids=ids_BT, use_cache=True, **state, **keep)
    token_B1 = output.logits[:, -1:].argmax(-1)
    first = _now(device)
    tokens = [token_B1]
    for _ in range(new_tokens - 1):
        output = model(input_ids=token_B1, use_cache=True, **_carried(output), **keep)
        token_B1 = output.logits[:, -1:].argmax(-1)
        tokens.append(token_B1)
    end = _now(device)
    return Decoded(torch.cat(tokens, 1).cpu(), first - start, end - first)
