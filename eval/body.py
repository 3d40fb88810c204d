"""A causal language model cut in two at its final hidden states, so that logits never have to be kept.

Shape legend: W windows, T tokens per window, C tokens per chunk, D hidden size, V vocabulary.

Comparing two models needs both of their logits for every token: W*T*V floats, 8 GB for 40 windows of 1024 tokens and a
vocabulary of 49152. The hidden states that the head turns into those logits are V/D times smaller (85 times here), so
we keep those, and run the head again for a chunk of tokens whenever its logits are wanted. That is also what lets two
models be compared with only one of them in memory: of the first one only its head stays.

The head is more than a matrix in some architectures (soft caps, scales, biases). Instead of knowing them, `Split` calls
the model's own `forward` with its body replaced by a stand-in that answers with recorded hidden states, and checks once
that this gives the logits of the whole model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from aerogel.errors import RunFailed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from aerogel.kernels.decode.direct import Direct

LARGEST_IN_MEMORY = 2 << 30
"""Recorded hidden states above this many bytes go to a temporary file that is mapped into memory."""


def vocabulary_of(model: PreTrainedModel | Direct) -> int:
    """Rows of the input embedding."""
    embedding: Any = model.get_input_embeddings()
    return int(embedding.num_embeddings)


class Recorded:
    """The answer of a body that only has its hidden states: whatever else a head looks for is None."""

    def __init__(self, hidden_1CD: Tensor | None) -> None:
        self.last_hidden_state = hidden_1CD

    def __getattr__(self, name: str) -> None:
        """Called for names that are not there, such as `router_logits`, `cross_attentions` or `cache_params`."""
        if name.startswith("_"):
            raise AttributeError(name)

    def __getitem__(self, place: int | slice) -> Any:
        """Older heads take the output for a tuple whose first element is the hidden states."""
        return (self.last_hidden_state,)[place]


class Replay(nn.Module):
    """Stands where a model's body was, and answers every call with the hidden states put into it."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden_1CD: Tensor | None = None

    @property
    def decoder(self) -> Replay:
        """Itself: some heads (OPT's) call `body.decoder` instead of the body."""
        return self

    def forward(self, *args: object, **kwargs: object) -> Recorded:
        """The recorded states."""
        return Recorded(self.hidden_1CD)


class Split:
    """`hidden(ids)` runs the body of `model`, `logits(hidden)` its head; `drop_body()` frees all but the head.

    Raises RunFailed when the model has no body that can be told from its head, or when the two halves together do not
    give the logits of the whole.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.prefix = model.base_model_prefix
        body = getattr(model, self.prefix, None) if self.prefix else None
        head = cast("Any", model).get_output_embeddings()
        if not isinstance(body, nn.Module) or head is None:
            raise RunFailed(
                f"{type(model).__name__} has no separate body and head, so its logits cannot be compared: "
                "evaluate a causal language model (a class named ...ForCausalLM)"
            )
        self.body: nn.Module | None = body
        self.replay = Replay()
        self.device = next((tensor.device for tensor in head.parameters()), model.device)
        self._check()

    @contextmanager
    def _replaying(self) -> Iterator[None]:
        setattr(self.model, self.prefix, self.replay)
        try:
            yield
        finally:
            if self.body is not None:
                setattr(self.model, self.prefix, self.body)

    @torch.inference_mode()
    def hidden(self, ids_WT: Tensor) -> Tensor:
        """Hidden states after the final norm, [W, T, D], in the data type the model computes in."""
        if self.body is None:
            raise RunFailed("the body of this model was already dropped: load the model again to run it")
        return self.body(input_ids=ids_WT.to(self.model.device), use_cache=False).last_hidden_state  # type: ignore[no-any-return]

    @torch.inference_mode()
    def logits(self, hidden_CD: Tensor) -> Tensor:
        """float32 logits [C, V] of recorded hidden states [C, D]."""
        with self._replaying():
            self.replay.hidden_1CD = hidden_CD[None].to(self.device)
            # Some heads look at the shape or the device of the ids, none at their values.
            ids_1C = torch.zeros(1, len(hidden_CD), dtype=torch.long, device=self.device)
            logits_1CV = self.model(input_ids=ids_1C, use_cache=False).logits
            self.replay.hidden_1CD = None
        return logits_1CV[0].float()  # type: ignore[no-any-return]

    def drop_body(self) -> None:
        """Keep only the head. The caller must let go of its own references to the layers for the memory to be freed."""
        self.body = None
        setattr(self.model, self.prefix, self.replay)

    @torch.inference_mode()
    def _check(self) -> None:
        ids_1T = (torch.arange(8) % vocabulary_of(self.model))[None].to(self.model.device)
        whole_TV = self.model(input_ids=ids_1T, use_cache=False).logits[0].float()
        halves_TV = self.logits(self.hidden(ids_1T)[0])
        if whole_TV.shape != halves_TV.shape or not torch.allclose(
            whole_TV, halves_TV.to(whole_TV.device), rtol=1e-2, atol=1e-2, equal_nan=True
        ):
            raise RunFailed(
                f"{type(self.model).__name__} computes logits from more than its final hidden states, so streaming "
                "evaluation would be wrong: compare it on tasks instead (evaluate.tasks, evaluate.divergence: false)"
            )


class HiddenStore:
    """Hidden states of all windows, [W, T, D], in memory or (above `LARGEST_IN_MEMORY` bytes) in a mapped file."""

    def __init__(self, windows: int, like_TD: Tensor, limit: int = LARGEST_IN_MEMORY) -> None:
        shape = (windows, *like_TD.shape)
        size = windows * like_TD.numel()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if size * like_TD.element_size() <= limit:
            self.states_WTD = torch.empty(shape, dtype=like_TD.dtype)
        else:
            self._folder = tempfile.TemporaryDirectory(prefix="aerogel-hidden-")
            path = str(Path(self._folder.name) / "states")
            self.states_WTD = torch.from_file(path, shared=True, size=size, dtype=like_TD.dtype).view(shape)

    def close(self) -> None:
        """Free the memory or the temporary file."""
        self.states_WTD = torch.empty(0)
        if self._folder is not None:
            self._folder.cleanup()
