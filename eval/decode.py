"""Greedy generation with a clock in it: how long the first token takes, and how long the others.

Shape legend: B sequences in a batch, T prompt tokens, R generated tokens.

Generation has two phases that a benchmark must not mix. Prefill runs the whole prompt through the model at once and is
bound by arithmetic; its end is the first token. Decode then runs one token per sequence at a time and is bound by the
bytes of weights read, which is what compression shrinks. Both run in the loop that `aerogel generate` uses
(`kernels.decode`), without sampling and without an early stop, so two models do exactly the same number of steps.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from aerogel.kernels.decode.loop import Decoder
from aerogel.kernels.linear import Linear

WHOLE = ("Linear", "Merged", "SidecarLinear", "MergedBeside")
"""Classes of packed linears that run a kernel; parts of a merged one have it from the whole."""


@dataclass(frozen=True)
class Decoded:
    """tokens_BR: int64 [B, R]. first_seconds: prompt to first token. rest_seconds: the R-1 tokens after it."""

    tokens_BR: Tensor
    first_seconds: float
    rest_seconds: float


def warm(decoder: Decoder, ids_BT: Tensor, new_tokens: int) -> None:
    """Lets the decoder choose and prepare its loop for this batch and this many tokens."""
    for _ in islice(decoder.stream(list(ids_BT), new_tokens), 3):
        pass


def decode(decoder: Decoder, ids_BT: Tensor, new_tokens: int) -> Decoded:
    """Generate `new_tokens` (at least 1) greedily for each prompt of `ids_BT` (int64 [B, T]), timing both phases."""
    device = decoder.model.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    steps: list[list[int | None]] = []
    start = first = time.perf_counter()
    # A step comes as numbers: the device was done with it when the clock is read.
    for tokens in decoder.stream(list(ids_BT), new_tokens):
        if not steps:
            first = time.perf_counter()
        steps.append(tokens)
    end = time.perf_counter()
    return Decoded(torch.tensor(steps).T, first - start, end - first)


def facts(decoder: Decoder) -> dict[str, Any]:
    """The loop that ran and the kernels of packed linears, by how many linears each ran; how many of them round inputs
    although the checkpoint does not say so, where any does."""
    linears = [module for module in decoder.model.modules() if type(module).__name__ in WHOLE]
    kernels = Counter(module.kernel_name or "not chosen" for module in linears if isinstance(module, Linear))
    rounding = sum(module.rounds_activations for module in linears if isinstance(module, Linear))
    return decoder.facts() | {"kernels": dict(kernels)} | ({"rounding": rounding} if rounding else {})
