"""Decoding the plain way: the model's forward and whatever cache it makes itself, one call per token.

For models that keep a recurrent state, or whose step cannot be traced; and the loop that the others are compared with.

Shape legend: B sequences, T prompt tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aerogel.kernels.decode.sample import Sampling, pick

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plain_steps(
    model: PreTrainedModel, ids_BT: Tensor, start_B: Tensor, new_tokens: int, sampling: Sampling
) -> Iterator[list[int]]:
    """Tokens of each step. ids_BT: left padded, `start_B` the first place of each sequence."""
    names = frozenset(inspect.signature(model.forward).parameters)
    generator = torch.Generator(model.device).manual_seed(sampling.seed)
    padded = bool(start_B.any())
    fixed: dict[str, Any] = {"use_cache": True} | ({"logits_to_keep": 1} if "logits_to_keep" in names else {})
    state: dict[str, Any] = {}
    token_B1 = ids_BT[:, :0]
    for step in range(new_tokens):
        if padded:
            places = torch.arange(int(ids_BT.shape[1]) if step == 0 else 1, device=ids_BT.device)
            seen = ids_BT.shape[1] + step
            state["attention_mask"] = (torch.arange(seen, device=ids_BT.device)[None] >= start_B[:, None]).long()
            if "position_ids" in names:
                first = 0 if step == 0 else seen - 1
                state["position_ids"] = (places[None] + first - start_B[:, None]).clamp_min(0)
        output = model(input_ids=ids_BT if step == 0 else token_B1, **state, **fixed)
        state = {name: output[name] for name in ("past_key_values", "cache_params") if output.get(name) is not None}
        token_B1 = pick(output.logits[:, -1], sampling, generator)
        yield token_B1[:, 0].tolist()
