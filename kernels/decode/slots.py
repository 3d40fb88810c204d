"""A key/value cache of fixed size: slots that are filled from the left, one more per step.

    slot        0   1   2   3   4   5   6          the prompts of a batch end at the same slot,
    row 0       .   .   a   b   c   d              so short ones begin later: start = 2, position of d = 3
    row 1       e   f   g   h   i   j              start = 0, position of j = 5

Nothing moves and nothing grows, so a step is the same work on the same addresses every time: it can be traced once,
and captured in a CUDA graph. All that changes from step to step are three small tensors in `State`.

The cache plays transformers' `Cache`. While the prompt is read (`fill`) it hands back the keys and values it is given,
since there are no others. In a step it depends on who attends: our own kernel (`attend`) takes the new key and value
and the slots, and writes them itself; the model's own attention (`mask`) gets all slots and a mask.

Sliding windows keep all slots: what lies behind the window is not read by our kernel, and masked out for the model's.

Shape legend: B sequences, H key/value heads, L slots, D size of a head.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from aerogel.errors import BadInput
from aerogel.kernels.decode.state import State

Mode = Literal["fill", "attend", "mask"]


class Slots(CacheLayerMixin):  # type: ignore[misc, no-untyped-call, unused-ignore]
    """The slots of one layer. keys, values: [B, H, L, D]. window: how many slots back it may look, None for all."""

    is_compileable = False
    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, owner: SlotCache, window: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.owner, self.window = owner, window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocates the slots when the first keys show their shape. Zeros, because a masked NaN is still a NaN."""
        if len(key_states) != len(self.owner.state.token_B1):
            raise BadInput("the model changes the batch between its input and its keys; use loop: dynamic for it")
        slots = self.owner.slots
        with torch.inference_mode(False):  # inference tensors could not be written to while a step is traced
            self.keys = key_states.new_zeros(*key_states.shape[:2], slots, key_states.shape[-1])
            self.values = value_states.new_zeros(*value_states.shape[:2], slots, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Takes new keys and values [B, H, T, D]; returns those to attend to, see the module's text."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.owner.mode == "fill":
            self.keys[:, :, : key_states.shape[2]] = key_states
            self.values[:, :, : value_states.shape[2]] = value_states
            return key_states, value_states
        if self.owner.mode == "attend":
            self.owner.pending = self
            return key_states, value_states
        slot_1 = self.owner.state.slot_1
        self.keys.index_copy_(2, slot_1, key_states)
        self.values.index_copy_(2, slot_1, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys a mask covers, and from which on."""
        return (query_length if self.owner.mode == "fill" else self.owner.slots), 0

    def get_seq_length(self) -> Any:
        """Filled slots: 0 before the prompt; a tensor in a step, so that it is not baked into a trace."""
        return 0 if self.owner.mode == "fill" else self.owner.state.slot_1[0]

    def get_max_length(self) -> int:
        """All slots."""
        return self.owner.slots

    def get_max_cache_shape(self) -> int:
        """All slots, by the name older versions call it."""
        return self.owner.slots


class SlotCache(Cache):  # type: ignore[misc, unused-ignore]
    """All layers' slots. `pending` is the layer whose new keys wait for our attention to take them."""

    def __init__(self, windows: list[int | None], slots: int, state: State) -> None:
        self.mode: Mode = "fill"
        self.slots, self.state = slots, state
        self.pending: Slots | None = None
        self.filled = [Slots(self, window) for window in windows]
        super().__init__(layers=list(self.filled))

    @property
    def is_compileable(self) -> bool:
        """Whether masks must be made even where they could be left out: in a step of the model's own attention."""
        return self.mode == "mask"

    def copy_filled(self, config: Any, length: int) -> DynamicCache:
        """transformers' growing cache with copies of the first `length` slots, to compare a step with."""
        cache = DynamicCache(config=config)
        for index, layer in enumerate(self.filled):
            if layer.is_initialized:
                cache.update(layer.keys[:, :, :length].clone(), layer.values[:, :, :length].clone(), index)
        return cache

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.filled if layer.is_initialized)


def windows_of(model: PreTrainedModel) -> tuple[list[int | None], str | None]:
    """Each layer's window, and why the model cannot use slots (None where it can).

    transformers' own growing cache knows the layers of an architecture: full attention, a window, or a recurrent state.
    """
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "attention_chunk_size", None):
        return [], "it attends in chunks"
    if model._is_stateful:
        return [], "it keeps a recurrent state, no keys and values"
    windows: list[int | None] = []
    layers = DynamicCache(config=config).layers
    for layer in layers:
        if not isinstance(layer, DynamicLayer) or "Indexed" in type(layer).__name__:
            return [], f"it has a {type(layer).__name__} in its cache"
        windows.append(getattr(layer, "sliding_window", None))
    return windows or [None] * int(config.num_hidden_layers), None
