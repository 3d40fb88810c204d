"""A Llama on the compiled CPU operations alone: prompts and steps are one list of operations each, without transformers.

    x = embed(ids)
    x = x + out(attention(rotate(qkv(norm(x)))))             for every block
    x = x + down(silu(gate(norm(x))) * up(norm(x)))
    logits = head(norm(x))                                   of the last token of each sequence

Everything a step touches keeps its place in memory, so the list is made once and run again and again (`operations`); a
prompt has its own, for its number of tokens. In the last block only keys and values of all tokens are needed: attention and
what follows it run for the last token. Operations round where transformers' modules round.

What it saves: importing the modules of transformers takes four seconds and 200 MB, more than a small model itself, and the
interpreter's part of reading a prompt is a quarter of its time. Which checkpoints it serves is decided in `model/direct.py`.

Shape legend: B sequences, T tokens, L slots, H query heads, J key/value heads, D size of a head, N features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from aerogel.kernels.decode import native_ops
from aerogel.kernels.decode.operations import Operations
from aerogel.kernels.decode.sample import Sampling, pick
from aerogel.kernels.decode.state import State
from aerogel.kernels.embedding import PackedEmbedding
from aerogel.kernels.linear import Linear
from aerogel.kernels.native import library

OTHER = 0x9E3779B9
"""Steps draw from another stream than the first token, which was drawn from the seed itself."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """queries, heads: H and J. head_size: D. epsilon: of the norms. frequencies: float32 [D / 2], radians per token."""

    queries: int
    heads: int
    head_size: int
    epsilon: float
    frequencies: Tensor


class Block(nn.Module):
    """One layer: linears [out, in] of merged siblings, weights of the two norms [N]."""

    def __init__(self, qkv: Linear, out: Linear, gate_up: Linear, down: Linear, norms: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.qkv, self.out, self.gate_up, self.down = qkv, out, gate_up, down
        self.first_norm: Tensor
        self.second_norm: Tensor
        for name, weight in zip(("first_norm", "second_norm"), norms, strict=True):
            self.register_buffer(name, weight)


class DenseHead(nn.Module):
    """A head whose weight [V, N] is not packed. (An `nn.Linear` would be initialised first, even on the meta device.)"""

    def __init__(self, weight_VN: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_VN, requires_grad=False)
        self.out_features = len(weight_VN)

    def forward(self, x: Tensor) -> Tensor:
        """[..., N] -> [..., V]."""
        return nn.functional.linear(x, self.weight)


class Direct(nn.Module):
    """See the module's text. Made by `model.direct.load`.

    Args:
        config, generation_config: what config.json and generation_config.json say, as attributes.
        embedding: gives [..., N] in the dtype of all activations.
        norm: [N], before the head.
    """

    def __init__(
        self,
        config: SimpleNamespace,
        generation_config: SimpleNamespace,
        sizes: Sizes,
        embedding: PackedEmbedding | nn.Embedding,
        blocks: list[Block],
        norm: Tensor,
        head: Linear | DenseHead,
    ) -> None:
        super().__init__()
        config.get_text_config = lambda decoder=False: config
        self.config, self.generation_config, self.sizes = config, generation_config, sizes
        self.embedding, self.head = embedding, head
        self.blocks = nn.ModuleList(blocks)
        self.norm: Tensor
        self.register_buffer("norm", norm)
        self.layers = tuple(blocks)
        self.eval()

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return self.norm.device

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return self.norm.dtype

    def get_input_embeddings(self) -> PackedEmbedding | nn.Embedding:
        """The embedding."""
        return self.embedding


class DirectSession:
    """One batch size of a `Direct` model: its slots, the operations of a step, and those of the last prompt's length.

    Args:
        batch, slots: how many sequences, and how many tokens each can hold.
    """

    way: ClassVar[str] = "direct"
    reasons: ClassVar[dict[str, str]] = {}
    fused: ClassVar[dict[str, int]] = {}
    seconds: ClassVar[float] = 0.0

    def __init__(self, model: Direct, batch: int, slots: int) -> None:
        self.model, self.batch, self.slots = model, batch, slots
        self.state = State.empty(batch, slots, model.device)
        sizes, layers = model.sizes, len(model.layers)
        self.keys = torch.zeros(layers, batch, sizes.heads, slots, sizes.head_size, dtype=model.dtype)
        self.values = torch.zeros_like(self.keys)
        angles_LD = torch.arange(slots)[:, None].float() * sizes.frequencies.repeat(2)
        self.cos_LD, self.sin_LD = angles_LD.cos().to(model.dtype), angles_LD.sin().to(model.dtype)
        self._prompt: _List | None = None
        self._step: _List | None = None
        self._generator = torch.Generator()

    @property
    def operators(self) -> int:
        """Compiled operations of a step."""
        return 0 if self._step is None else self._step.operations.count

    def fill(self, ids_BT: Tensor, start_B: Tensor) -> Tensor:
        """Reads the prompts into the slots; logits of their last tokens [B, V]."""
        with library.own_pool():
            if self._prompt is None or not self._prompt.fits(ids_BT.shape[1]):
                self._prompt = None  # frees its memory before another is made
                self._prompt = _List(self, ids_BT.shape[1], start_B=self.state.start_B)
            self.state.start_B.copy_(start_B)
            self._prompt.ids_BT.copy_(ids_BT)
            places_BT = (torch.arange(ids_BT.shape[1])[None] - start_B[:, None]).clamp_min(0)
            return self._prompt.run(places_BT)

    def stepper(self, sampling: Sampling) -> Callable[[], Tensor]:
        """A function that takes one step and returns `state.token_B1`, which holds the new tokens."""
        generator = self._generator.manual_seed(sampling.seed ^ OTHER)
        dense = isinstance(self.model.head, DenseHead)
        own: Callable[[], AbstractContextManager[None]] = nullcontext if dense else library.own_pool
        if self._step is None or not self._step.fits(1):
            self._step = _List(self, 1, start_B=None, ids_BT=self.state.token_B1)
        steps = self._step

        def step() -> Tensor:
            with own():
                token_B1 = pick(steps.run(self.state.position_B1), sampling, generator)
            self.state.advance(token_B1)
            return self.state.token_B1

        return step


class _List:
    """The operations of `tokens` tokens of a session: of a prompt where `start_B` is given, else of a step."""

    def __init__(self, session: DirectSession, tokens: int, *, start_B: Tensor | None, ids_BT: Tensor | None = None) -> None:
        model, sizes = session.model, session.model.sizes
        self.session, self.start_B, self.tokens = session, start_B, tokens
        self.ids_BT = torch.zeros(session.batch, tokens, dtype=torch.int64) if ids_BT is None else ids_BT
        self.cos_BTD, self.sin_BTD = (self._empty(tokens, sizes.head_size) for _ in range(2))
        self.operations, self.threads = Operations(), library.threads()
        self._held: dict[tuple[str, int], Tensor] = {}
        self.rounding = self._numerics()
        x_BTN, y_BTN = self._embed(), self._empty(tokens, model.norm.shape[0])
        self._norm(x_BTN, None, model.layers[0].first_norm, y_BTN)
        last = len(model.layers) - 1
        for index, block in enumerate(model.layers):
            only = index == last and tokens > 1
            attended = self._attention(index, block, y_BTN, 1 if only else tokens)
            if only:
                x_BTN, whole = self._empty(1, x_BTN.shape[2]), x_BTN
                y_BTN = torch.empty_like(x_BTN)
                self.operations.call(_copier(x_BTN, whole[:, -1:]))
            self._linear(block.out, attended, y_BTN)
            self._norm(x_BTN, y_BTN, block.second_norm, y_BTN)
            self._mlp(block, y_BTN)
            self._norm(x_BTN, y_BTN, model.norm if index == last else model.layers[index + 1].first_norm, y_BTN)
        self.logits_B1V = self._empty(1, model.head.out_features)
        self._head(model.head, y_BTN)

    def fits(self, tokens: int) -> bool:
        """Whether it is right for so many tokens, with the threads and the arithmetic that are wanted now."""
        return (self.tokens, self.threads, self.rounding) == (tokens, library.threads(), self._numerics())

    def run(self, places_BT: Tensor) -> Tensor:
        """Logits [B, V], in new memory, of what is in `ids_BT`, whose tokens stand at these places of their sequences."""
        for angles_BTD, table_LD in ((self.cos_BTD, self.session.cos_LD), (self.sin_BTD, self.session.sin_LD)):
            torch.index_select(table_LD, 0, places_BT.reshape(-1), out=angles_BTD.view(-1, table_LD.shape[1]))
        self.operations.run()
        return self.logits_B1V[:, 0].clone()

    def _numerics(self) -> list[str | None]:
        return [module.kernel_name for module in self.session.model.modules() if isinstance(module, Linear)]

    def _empty(self, tokens: int, size: int) -> Tensor:
        return torch.empty(self.session.batch, tokens, size, dtype=self.session.model.dtype)

    def _shared(self, name: str, tokens: int, size: int) -> Tensor:
        """A result that all blocks write to, one after the other."""
        return self._held.setdefault((name, tokens), self._empty(tokens, size))

    def _embed(self) -> Tensor:
        embedding = self.session.model.embedding
        x_BTN = self._empty(self.tokens, embedding.embedding_dim)
        if isinstance(embedding, nn.Embedding):
            rows, ids = x_BTN.view(-1, x_BTN.shape[2]), self.ids_BT.view(-1)
            self.operations.call(lambda: torch.index_select(embedding.weight, 0, ids, out=rows))
        elif not self.operations.rows(embedding, self.ids_BT, x_BTN):
            self.operations.call(lambda: x_BTN.copy_(embedding(self.ids_BT)))
        return x_BTN

    def _linear(self, module: Linear, x: Tensor, y: Tensor) -> None:
        if not self.operations.linear(module, x, y):
            self.operations.call(lambda: y.copy_(module(x)))

    def _head(self, head: Linear | DenseHead, y_B1N: Tensor) -> None:
        if isinstance(head, Linear):
            self._linear(head, y_B1N, self.logits_B1V)
        else:
            self.operations.call(lambda: self.logits_B1V.copy_(head(y_B1N)))

    def _norm(self, x: Tensor, add: Tensor | None, weight_N: Tensor, y: Tensor) -> None:
        """x = x + add where there is something to add, y = norm(x). Each row is read before it is written."""
        total = None if add is None else x
        arguments = native_ops.norm_arguments(x, add, weight_N, total, y, self.session.model.sizes.epsilon, True)
        self.operations.add("norm", arguments, None, x, add, weight_N, y)

    def _attention(self, index: int, block: Block, y_BTN: Tensor, wanted: int) -> Tensor:
        """Of the last `wanted` tokens: [B, wanted, H * D]."""
        session, sizes = self.session, self.session.model.sizes
        H, J, D = sizes.queries, sizes.heads, sizes.head_size
        qkv = self._shared("qkv", self.tokens, (H + 2 * J) * D)
        self._linear(block.qkv, y_BTN, qkv)
        heads = qkv.view(session.batch, self.tokens, H + 2 * J, D).transpose(1, 2)
        q, k, v = heads[:, :H], heads[:, H : H + J], heads[:, H + J :]
        out = self._shared("attended", wanted, H * D).view(session.batch, wanted, H, D)
        keys, values, angles, scale = session.keys[index], session.values[index], (self.cos_BTD, self.sin_BTD), D**-0.5
        arguments: Any
        if self.start_B is not None:
            arguments = native_ops.prompt_arguments(out, q, k, v, scale, *angles, keys, values, self.start_B)
        else:
            state = session.state
            arguments = native_ops.attend_arguments(
                out, q, k, v, *angles, keys, values, state.slot_1, state.start_B, scale, 0, 0.0, None
            )
        if arguments is None:
            raise RuntimeError("attention of a shape that was to be refused when the model was loaded")
        self.operations.add("prompt" if self.start_B is not None else "attend", arguments, None, qkv, out, keys, values)
        return out.view(session.batch, wanted, H * D)

    def _mlp(self, block: Block, y: Tensor) -> None:
        """y = down(silu(gate) * up), where the norm of what goes in was in y."""
        half = block.down.in_features
        wide, inner = self._shared("wide", y.shape[1], 2 * half), self._shared("inner", y.shape[1], half)
        self._linear(block.gate_up, y, wide)
        arguments = native_ops.gate_arguments(wide[..., :half], wide[..., half:], "silu", inner)
        if arguments is None:
            raise RuntimeError("a gate of a shape that was to be refused when the model was loaded")
        self.operations.add("gate", arguments, None, wide, inner)
        self._linear(block.down, inner, y)


def _copier(to: Tensor, source: Tensor) -> Callable[[], object]:
    return lambda: to.copy_(source)
