"""Prompts read by CUDA graphs: a prompt of a length that was read before costs the device's time, not Python's.

A model of 32 layers launches some 500 operators for a prompt, which takes Python 25 to 60 ms whatever the prompt's length; a
device that decodes 470 tokens a second multiplies 128 of them in five. A step has its graph (`session`); here prompts get
theirs, one for each length. Lengths are rounded up, so that few graphs, and few plans of the matmuls, serve all prompts:

    tokens         0   1   2   3   .   .   .   .        what is filled in stands behind the prompt, where no token of it looks
    slots          k0  k1  k2  k3  -   -   -   -        and its keys are overwritten by the steps before anybody reads them
    logits                     ^                        of the last token, whose place the graph finds in a tensor

A length is captured when it comes for the second time; until then it is read the usual way, rounded up all the same, so that
the same prompt is the same work every time.

Shape legend: B sequences, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, masking_utils

from aerogel.kernels.cuda.record import recording
from aerogel.kernels.sidecars import ColumnProduct

MOST_TOKENS = 4096
"""Of all sequences together, up to which there are graphs: more keep a device busy for longer than Python takes, and a graph
holds the memory of all that is computed inside."""
MOST_GRAPHS = 16
STRETCHED = frozenset({"dynamic", "longrope"})
"""Rotations whose angles depend on how long the whole input is."""

Forward = Callable[[Tensor, int | Tensor], Tensor]
"""(ids [B, T], which logits to keep: 1 for the last token's, or a place int64 [1]) -> logits [B, V]."""


def rounded(tokens: int) -> int:
    """The length that a prompt of so many tokens is read with: at most a sixteenth more from 256 tokens on."""
    grain = 1 if tokens <= 16 else 16 if tokens <= 256 else 64
    return -(-tokens // grain) * grain


def unfit(model: PreTrainedModel) -> str | None:
    """Why tokens behind a prompt could change what its own tokens come to, or None."""
    if model.device.type != "cuda":
        return "graphs are for CUDA devices"
    keep = inspect.signature(model.forward).parameters.get("logits_to_keep")
    if keep is None or "Tensor" not in str(keep.annotation):
        return "the model cannot give the logits of one token in the middle"
    config = model.config.get_text_config(decoder=True)
    angles = getattr(config, "rope_parameters", None) or {}
    kinds = {str(given.get("rope_type")) for given in (angles, *angles.values()) if isinstance(given, dict)}
    if kinds & STRETCHED:
        return f"its rotation ({', '.join(sorted(kinds & STRETCHED))}) depends on the length of the input"
    if any(isinstance(module, ColumnProduct) and module.looks for module in model.modules()):
        return "its kept columns depend on all tokens of the input"
    return None


@contextmanager
def causal_without_masks() -> Iterator[None]:
    """Models inside leave the causal mask out while a graph is captured, as they do otherwise.

    transformers (5.17, say) makes every mask while it sees a capture, since whether padding can be ignored depends on values.
    With a mask attention takes a slower kernel; prompts that are captured have no padding.
    """
    name = "is_tracing"
    kept = getattr(masking_utils, name, None)
    if kept is None:
        yield
        return
    setattr(masking_utils, name, lambda tensor=None: False)
    try:
        yield
    finally:
        setattr(masking_utils, name, kept)


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    ids_BT: Tensor
    last_1: Tensor
    logits_BV: Tensor


class PromptGraphs:
    """See the module's text. `reason` says why there are none, where there are none."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.reason = unfit(model)
        self._seen: set[int] = set()
        self._captured: OrderedDict[int, _Captured] = OrderedDict()
        self._fits = self.reason is None  # lengths are rounded; so they stay where a capture fails, which is another reason
        self._pool = None if self.reason else torch.cuda.graph_pool_handle()  # one: no two of them run at a time

    def length(self, batch: int, tokens: int) -> int:
        """How many tokens are read of a prompt that has so many."""
        return rounded(tokens) if self._fits and batch * rounded(tokens) <= MOST_TOKENS else tokens

    def read(self, ids_BT: Tensor, forward: Forward) -> Tensor:
        """Logits [B, V] of the last tokens of prompts [B, T] without padding."""
        batch, tokens = ids_BT.shape
        length = self.length(batch, tokens)
        if not self._fits or batch * length > MOST_TOKENS:
            return forward(ids_BT, 1)
        ids_BT, last_1 = pad(ids_BT, (0, length - tokens)), torch.full((1,), tokens - 1, device=ids_BT.device)
        if self.reason is not None:
            return forward(ids_BT, last_1)
        if length in self._seen and length not in self._captured:
            self._capture(ids_BT, last_1, forward)
        self._seen.add(length)
        held = self._captured.get(length)
        if held is None:
            return forward(ids_BT, last_1)
        self._captured.move_to_end(length)
        held.ids_BT.copy_(ids_BT)
        held.last_1.copy_(last_1)
        held.graph.replay()
        return held.logits_BV.clone()

    def _capture(self, ids_BT: Tensor, last_1: Tensor, forward: Forward) -> None:
        """Records the forward of this length, which has run before, so that nothing is compiled or planned inside."""
        while len(self._captured) >= MOST_GRAPHS:
            self._captured.popitem(last=False)
        graph = torch.cuda.CUDAGraph()
        ids_BT, last_1 = ids_BT.clone(), last_1.clone()
        try:
            with causal_without_masks(), recording(graph, ids_BT.device, self._pool):
                logits_BV = forward(ids_BT, last_1)
        except RuntimeError as error:
            # Some operators talk to the host inside; prompts are then read uncaptured, and the report says so.
            self.reason = str(error).strip().splitlines()[0][:160]
            return
        self._captured[ids_BT.shape[1]] = _Captured(graph, ids_BT, last_1, logits_BV)
