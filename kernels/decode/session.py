"""One batch size of one model, made ready to decode: slots, the traced step, and on CUDA its graph.

`prepare` runs behind a prompt. It takes two steps the plain way, as transformers would, and then looks for the fastest
way whose logits are the same on both:

    fused    our attention over the slots, small operations fused, traced       (any model that looks its attention up)
    masked   the model's own attention over all slots with a mask, fused, traced
    plain    none of it: the model as it is, with its growing cache

The first of the two steps is the one that is traced, the second shows that nothing of the first was baked in. What was
tried and why it was left is in `reasons`, never silent.

Shape legend: B sequences, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from aerogel.kernels.ahead import compile_ahead
from aerogel.kernels.cuda.record import recording
from aerogel.kernels.decode import ops
from aerogel.kernels.decode.attention import attending
from aerogel.kernels.decode.fuse import fuse
from aerogel.kernels.decode.lower import lower, straight
from aerogel.kernels.decode.merge import Part
from aerogel.kernels.decode.prompt_attention import reading
from aerogel.kernels.decode.prompt_graphs import PromptGraphs
from aerogel.kernels.decode.reading import Parts, parts_of
from aerogel.kernels.decode.sample import Sampling, pick
from aerogel.kernels.decode.slots import Mode, SlotCache
from aerogel.kernels.decode.state import State
from aerogel.kernels.decode.trace import CannotTrace, Program, clean, trace
from aerogel.kernels.embedding import PackedEmbedding
from aerogel.kernels.expert_linears import ExpertLinears
from aerogel.kernels.linear import Linear
from aerogel.kernels.native import library
from aerogel.lazy import load

Way = Literal["fused", "masked", "plain"]
SAME = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
"""Relative Frobenius distance of logits up to which two ways count as the same, by the type they are computed in, for a model
of up to SHALLOW layers. Roundings of more add up like steps of a random walk: 0.03 to 0.061 were seen in bfloat16 for 32 layers
of random weights, which hide nothing; a wrong position or a wrong mask is far beyond."""
SHALLOW = 12
OTHER = 0x9E3779B9
"""Steps draw from another stream than the first token, which was drawn from the seed itself."""
NATIVE = "aerogel.kernels.decode.native_program:NativeProgram"
"""The step as compiled CPU operations; loaded by name, since it needs the compiled library."""
_MODES: dict[str, Mode] = {"fused": "attend", "masked": "mask"}


class Session:
    """See the module's text.

    Args:
        model: in eval mode. batch, slots: how many sequences, and how many tokens each can hold.
        windows: of `slots.windows_of`.
    """

    def __init__(self, model: PreTrainedModel, batch: int, slots: int, windows: list[int | None]) -> None:
        self.model, self.batch, self.slots = model, batch, slots
        self.names = frozenset(inspect.signature(model.forward).parameters)
        with torch.inference_mode(False):
            self.state = State.empty(batch, slots, model.device)
        self.cache = SlotCache(windows, slots, self.state)
        self.way: Way | None = None
        self.reasons: dict[str, str] = {}
        self.fused: dict[str, int] = {}
        self.not_native: str | None = None
        self.operators = 0
        self.seconds = 0.0
        self._program: Any = None
        self._compiled: set[int] = set()
        self._parts: Parts | None = None
        self._prompts = PromptGraphs(model)
        self._dense: tuple[bool, bool] | None = None
        self._graphs: dict[Sampling, tuple[torch.cuda.CUDAGraph, torch.Generator]] = {}
        self._generator = torch.Generator(model.device)

    def fill(self, ids_BT: Tensor, start_B: Tensor) -> Tensor:
        """Reads the prompts into the slots; logits of their last tokens [B, V]."""
        padded = bool(start_B.any())
        read = self.batch * (ids_BT.shape[1] if padded else self._prompts.length(*ids_BT.shape))
        compile_ahead(self.model, {self.batch, read} - self._compiled)
        self._compiled |= {self.batch, read}
        self.cache.mode = "fill"
        if self._parts is None:
            self._parts = parts_of(self.model) if ops.missing(self.model.device) is None else Parts()
        on_cpu = self.model.device.type == "cpu"
        with self._parts.replaced(), reading() if on_cpu else nullcontext(), self._pool(with_head=False):
            logits_BV = self._read_padded(ids_BT, start_B) if padded else self._prompts.read(ids_BT, self._read)
        if not on_cpu and self._prompts.reason:
            self.reasons["prompt graph"] = self._prompts.reason
        return logits_BV

    def _read(self, ids_BT: Tensor, keep: int | Tensor) -> Tensor:
        """Prompts that all begin at the first slot."""
        positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        return self._forward(ids_BT, positions_BT, None, self.cache, keep)

    def _read_padded(self, ids_BT: Tensor, start_B: Tensor) -> Tensor:
        valid_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None] >= start_B[:, None]
        return self._forward(ids_BT, (valid_BT.long().cumsum(-1) - 1).clamp_min(0), valid_BT, self.cache)

    def _pool(self, with_head: bool) -> AbstractContextManager[None]:
        """The compiled library's own threads where all products are its own; the head has but one row when a prompt is read."""
        if self.model.device.type != "cpu":
            return nullcontext()
        if self._dense is None:
            head = self.model.get_output_embeddings()  # type: ignore[no-untyped-call, unused-ignore]
            dense = {module for module in self.model.modules() if isinstance(module, nn.Linear | Conv1D)}
            self._dense = bool(dense - {head}), bool(dense)
        return nullcontext() if self._dense[with_head] else library.own_pool()

    def _forward(self, ids: Tensor, positions: Tensor, valid: Tensor | None, cache: Any, keep: int | Tensor = 1) -> Tensor:
        given: dict[str, Any] = {"position_ids": positions, "logits_to_keep": keep}
        given = {name: value for name, value in given.items() if name in self.names}
        if valid is not None:
            given["attention_mask"] = valid
        output = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **given)
        logits: Tensor = output.logits[:, -1]
        return logits

    def prepare(self, token_B1: Tensor, length: int, start_B: Tensor, allowed: tuple[Way, ...]) -> None:
        """Chooses and traces the way behind prompts of `length` slots; see the module's text."""
        begin = time.perf_counter()
        probes = [token_B1, (token_B1 + 1) % int(self.model.config.get_text_config().vocab_size)]
        with torch.inference_mode():
            expected = self._plain(probes, length, start_B)
        for way in allowed:
            reason = None if way == "plain" else self._try(way, probes, expected, length, start_B)
            if reason is None:
                self.way = way
                break
            self.reasons[way] = reason
        self.seconds = time.perf_counter() - begin

    def _plain(self, probes: list[Tensor], length: int, start_B: Tensor) -> list[Tensor]:
        cache = self.cache.copy_filled(self.model.config.get_text_config(decoder=True), length)
        padded, found = bool(start_B.any()), []
        for slot, token_B1 in enumerate(probes, start=length):
            valid = torch.arange(slot + 1, device=start_B.device)[None] >= start_B[:, None] if padded else None
            found.append(self._forward(token_B1, slot - start_B[:, None], valid, cache).float())
        return found

    def _try(self, way: Way, probes: list[Tensor], expected: list[Tensor], length: int, start_B: Tensor) -> str | None:
        """None when the way gives the expected logits, else why it is not taken."""
        mode, lacking = _MODES[way], ops.missing(self.model.device)
        if way == "fused" and lacking:
            return lacking
        try:
            program: Any = None
            for slot, (token_B1, wanted_BV) in enumerate(zip(probes, expected, strict=True), start=length):
                with torch.inference_mode(False), torch.no_grad():
                    self.state.begin(token_B1.clone(), slot, start_B.clone())
                    if program is None:
                        program = self._trace(mode)
                    found_BV = program(*self._arguments())
                distance = float((found_BV.float() - wanted_BV).norm() / wanted_BV.norm().clamp_min(1e-30))
                if not distance < SAME.get(found_BV.dtype, 1e-3) * max(1.0, self._layers() / SHALLOW) ** 0.5:
                    return f"its logits would differ from the model's own by {distance:.2g}"
        except CannotTrace as error:
            return str(error)
        self._program = program
        self.operators = program.operators if program is not None else 0
        return None

    def _layers(self) -> int:
        return int(self.model.config.get_text_config(decoder=True).num_hidden_layers)

    def _trace(self, mode: Mode) -> Any:
        def step(token_B1: Tensor, position_B1: Tensor, slot_1: Tensor, start_B: Tensor, valid_BL: Tensor) -> Tensor:
            self.cache.state = State(token_B1, position_B1, slot_1, start_B, valid_BL)
            with attending(self.model, self.cache, mode):
                return self._forward(token_B1, position_B1, valid_BL if mode == "mask" else None, self.cache)

        try:
            # Experts that are linears of their own are one operator, which calls them.
            inside = {part for module in self.model.modules() if isinstance(module, ExpertLinears) for part in module.modules()}
            modules = [module for module in self.model.modules() if not isinstance(module, Part) and module not in inside]
            whole: dict[Any, Callable[[Tensor], Tensor]] = {m: straight(m) for m in modules if isinstance(m, Linear)}
            whole |= {m: m.straight() for m in modules if isinstance(m, PackedEmbedding)}
            graph = trace(step, *self._arguments(), whole=whole)
        finally:
            self.cache.state = self.state
        self.fused = {} if ops.missing(self.model.device) else fuse(graph)
        if self.model.device.type == "cpu":
            clean(graph)
            try:
                return load(NATIVE)(graph)
            except (CannotTrace, ImportError) as error:
                self.not_native = str(error)
            lower(graph)
        clean(graph)
        return Program(graph)

    def _arguments(self) -> tuple[Tensor, ...]:
        state = self.state
        return state.token_B1, state.position_B1, state.slot_1, state.start_B, state.valid_BL

    def stepper(self, sampling: Sampling) -> Callable[[], Tensor]:
        """A function that takes one step and returns `state.token_B1`, which holds the new tokens. Only once prepared."""
        if self.model.device.type != "cuda":
            generator = self._generator.manual_seed(sampling.seed ^ OTHER)
            return lambda: self._step(sampling, generator)
        key = replace(sampling, seed=0)
        if key not in self._graphs and "graph" not in self.reasons:
            saved = [tensor.clone() for tensor in self._arguments()]
            try:
                self._graphs[key] = self._capture(sampling)
            except RuntimeError as error:
                # Some operators talk to the host inside; the step then runs uncaptured, and the report says so.
                self.reasons["graph"] = str(error).strip().splitlines()[0][:160]
            for tensor, value in zip(self._arguments(), saved, strict=True):
                tensor.copy_(value)
        if key not in self._graphs:
            generator = self._generator.manual_seed(sampling.seed ^ OTHER)
            return lambda: self._step(sampling, generator)
        graph, generator = self._graphs[key]
        generator.manual_seed(sampling.seed ^ OTHER)

        def replay() -> Tensor:
            graph.replay()
            return self.state.token_B1

        return replay

    @property
    def captured(self) -> bool:
        """Whether steps are replays of a CUDA graph."""
        return bool(self._graphs)

    def _step(self, sampling: Sampling, generator: torch.Generator) -> Tensor:
        if self._program is None:
            raise RuntimeError("a session steps only after prepare() has found a way")
        with self._pool(with_head=True):
            token_B1 = pick(self._program(*self._arguments()), sampling, generator)
        self.state.advance(token_B1)
        return self.state.token_B1

    def _capture(self, sampling: Sampling) -> tuple[torch.cuda.CUDAGraph, torch.Generator]:
        """Records one step. Capturing runs nothing, but the warm-up before it takes a step."""
        generator = torch.Generator(self.model.device).manual_seed(sampling.seed ^ OTHER)
        graph = torch.cuda.CUDAGraph()
        if not sampling.greedy:
            graph.register_generator_state(generator)
        stream = torch.cuda.Stream(self.model.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.model.device))
        with torch.cuda.stream(stream):
            self._step(sampling, generator)
        torch.cuda.current_stream(self.model.device).wait_stream(stream)
        with recording(graph, self.model.device):
            self._step(sampling, generator)
        return graph, generator
