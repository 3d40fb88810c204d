"""The next token from logits, on the device, without asking it for anything.

    greedy   argmax z                                       temperature 0
    sampled  argmax p_v / e_v,  e_v ~ Exp(1)                which draws v with probability p_v, without a sum or a search
             p = softmax(z / T), of the k largest, of the smallest set whose probabilities reach top_p

The cuts are transformers': top_k keeps what ties with the k-th, top_p keeps at least the likeliest token.

Shape legend: B sequences, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from aerogel.errors import BadInput

RUN = 128


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """temperature: 0 takes the likeliest token. top_k: 0 for all. top_p: 1 for all. seed: of the draws."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise BadInput(f"temperature must be a number from 0 on, found {self.temperature}; 0 takes the likeliest token")
        if self.top_k < 0:
            raise BadInput(f"top_k must not be negative, found {self.top_k}; 0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise BadInput(f"top_p must lie above 0 and be at most 1, found {self.top_p}; 1 keeps all tokens")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0


def kept(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """float32 logits over the temperature, -inf where `top_k` and `top_p` cut."""
    scores = logits_BV.float() / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, -math.inf)
    if sampling.top_p < 1:
        ordered = scores.sort(dim=-1, descending=True).values
        shares = torch.softmax(ordered, -1)
        before = shares.cumsum(-1) - shares  # of the likelier ones: 0 for the likeliest, which therefore stays
        least = ordered.masked_fill(before >= sampling.top_p, math.inf).amin(-1, keepdim=True)
        scores = scores.masked_fill(scores < least, -math.inf)
    return scores


def likeliest(logits_BV: Tensor) -> Tensor:
    """argmax over the vocabulary, int64 [B, 1].

    Torch reduces a row with one block on CUDA, 36 microseconds for 128256 logits, and number by number on a CPU, 180 for 49152
    in bfloat16. In two stages, over runs of 128 and then over the runs, it takes a quarter of that. On a CPU vectors find the
    largest number of a run but not its place, which is looked for in one run alone.
    """
    B, V = logits_BV.shape
    if V % RUN or V < 64 * RUN:
        return logits_BV.argmax(-1, keepdim=True)
    runs = logits_BV.view(B, V // RUN, RUN)
    if logits_BV.device.type != "cuda":
        run_B1 = runs.amax(-1).argmax(-1, keepdim=True)
        return run_B1 * RUN + runs.take_along_dim(run_B1[..., None], 1)[:, 0].argmax(-1, keepdim=True)
    best, place = runs.max(-1)
    run_B1 = best.argmax(-1, keepdim=True)
    return run_B1 * RUN + place.gather(1, run_B1)


def pick(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """The next tokens, int64 [B, 1]. `generator` must be one of the logits' device; greedy picks need none."""
    if sampling.greedy:
        return likeliest(logits_BV)
    shares = torch.softmax(kept(logits_BV, sampling), -1)
    return (shares / torch.empty_like(shares).exponential_(generator=generator)).argmax(-1, keepdim=True)
