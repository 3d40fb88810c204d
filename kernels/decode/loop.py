"""The decode loop: prompts in, tokens out one step at a time, dense and compressed models alike.

    prompts --left padded--> fill (one forward) --> first token --> step, step, step ... --> tokens, as they come
                                                   one `Session` per batch size, kept for the next prompts

On CUDA a step is one graph launch, and the loop is one step ahead of what it has handed out, so that the device never
waits for Python to look at a token; the step too many at the end is thrown away. On the CPU a step is one flat function.
Models that cannot decode over slots run the plain way (`plain`), which `Decoder.facts` says together with the reason. A model
that was loaded without transformers (`direct`) brings its own session.

Shape legend: B sequences, T tokens of the longest prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor

from aerogel.errors import BadInput
from aerogel.kernels.decode.direct import Direct, DirectSession
from aerogel.kernels.decode.sample import Sampling, pick
from aerogel.kernels.decode.state import GRAIN

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from aerogel.kernels.decode.session import Session, Way

Loop = Literal["auto", "direct", "fused", "masked", "plain"]
LOOPS: tuple[str, ...] = get_args(Loop)
Tokens = list[int | None]
"""One step's tokens, one per sequence; None where a sequence had ended before."""


class Decoder:
    """Decodes with `model` (in eval mode, on one device).

    Args:
        loop: "auto" takes the fastest way that gives the model's own logits: see `session`. The others force one; "direct" is
            the only one for a model of `model.direct`, and for no other.
    """

    def __init__(self, model: PreTrainedModel | Direct, loop: Loop = "auto") -> None:
        if loop not in LOOPS:
            raise BadInput(f"unknown loop {loop!r}; write one of {', '.join(LOOPS)}")
        self.model, self.loop = model, loop
        self.way: str | None = None
        self.session: Session | DirectSession | None = None
        self.windows: list[int | None] = []
        self.reasons: dict[str, str] = {}
        if loop != "auto" and isinstance(model, Direct) != (loop == "direct"):
            raise BadInput(f"loop {loop} is not one of a {type(model).__name__}; load it for that loop, or write loop auto")
        if not isinstance(model, Direct):
            from aerogel.kernels.decode.slots import windows_of

            self.windows, refusal = windows_of(model)
            self.reasons |= {} if refusal is None else {"fused": refusal, "masked": refusal}
            not_direct = getattr(model, "not_direct", None)
            self.reasons |= {} if not_direct is None else {"direct": not_direct}

    def facts(self) -> dict[str, Any]:
        """What ran: way, whether in a CUDA graph, operators per step, what was fused, seconds of preparation, reasons."""
        session = self.session
        found: dict[str, Any] = {
            "loop": self.way,
            "graph": self.model.device.type == "cuda" and self.way not in (None, "plain"),
        }
        if session is not None and session.way not in (None, "plain"):
            found |= {"operators": session.operators, "fused": session.fused, "prepare_seconds": session.seconds}
        reasons = self.reasons | (session.reasons if session is not None else {})
        return found | ({"not": reasons} if reasons else {})

    def stream(
        self,
        prompts: Sequence[Tensor],
        new_tokens: int,
        *,
        sampling: Sampling | None = None,
        stop: frozenset[int] = frozenset(),
    ) -> Iterator[Tokens]:
        """Tokens of each step as they come; a sequence that has made a token of `stop` gives None from then on.

        Args:
            prompts: int64 [T_b] each, of any lengths.
            new_tokens: at most so many for each sequence.

        Raises:
            BadInput: nothing to read, or more tokens than the model has positions.
        """
        sampling = sampling or Sampling()
        self.check(prompts, new_tokens)
        alive = [True] * len(prompts)
        steps = self._steps(*left_padded(prompts, self.model.device), new_tokens, sampling)
        for tokens in steps:
            yield [token if live else None for token, live in zip(tokens, alive, strict=True)]
            alive = [live and token not in stop for token, live in zip(tokens, alive, strict=True)]
            if not any(alive):
                return

    def check(self, prompts: Sequence[Tensor], new_tokens: int) -> None:
        """Raises BadInput for what `stream` cannot run."""
        if not prompts or any(prompt.numel() == 0 for prompt in prompts):
            raise BadInput("a prompt has no tokens; write some text")
        if new_tokens < 1:
            raise BadInput(f"new_tokens must be at least 1, found {new_tokens}")
        longest = max(len(prompt) for prompt in prompts)
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(limit, int) and longest + new_tokens > limit:
            room = limit - longest
            advice = f"at most {room} new tokens fit" if room > 0 else f"shorten the prompt to less than {limit} tokens"
            raise BadInput(
                f"the prompt has {longest} tokens and {new_tokens} are to follow, the model has {limit} positions: {advice}"
            )

    @torch.inference_mode()
    def _steps(self, ids_BT: Tensor, start_B: Tensor, new_tokens: int, sampling: Sampling) -> Iterator[list[int]]:
        batch, length = ids_BT.shape
        from aerogel.kernels.decode.plain import plain_steps

        plain = self.way == "plain" or self.loop == "plain" or not self.windows
        if not isinstance(self.model, Direct) and plain:
            self.way = "plain"
            yield from plain_steps(self.model, ids_BT, start_B, new_tokens, sampling)
            return
        session = self._session(batch, length + new_tokens)
        generator = torch.Generator(self.model.device).manual_seed(sampling.seed)
        token_B1 = pick(session.fill(ids_BT, start_B), sampling, generator)
        yield token_B1[:, 0].tolist()
        if new_tokens == 1:
            return
        if not isinstance(session, DirectSession) and session.way is None:
            ways: tuple[Way, ...] = ("fused", "masked", "plain")
            session.prepare(token_B1, length, start_B, ways if self.loop == "auto" else (cast("Way", self.loop),))
            if session.way is None:
                raise BadInput(f"loop {self.loop} cannot run this model ({session.reasons[self.loop]}); write loop auto")
        self.way = session.way
        if not isinstance(self.model, Direct) and session.way == "plain":
            again = plain_steps(self.model, ids_BT, start_B, new_tokens, sampling)
            next(again)  # the first token is out already, and the same
            yield from again
            return
        session.state.begin(token_B1, length, start_B)
        yield from (
            _ahead(session, sampling, new_tokens - 1)
            if self.model.device.type == "cuda"
            else _exact(session, sampling, new_tokens - 1)
        )

    def _session(self, batch: int, tokens: int) -> Session | DirectSession:
        """The session of this batch; a new one when there is none or it is too small."""
        held = self.session
        if held is None or held.batch != batch or held.slots < tokens:
            self.session = held = None  # frees the slots of the old one before new ones are made
            slots = -(-tokens // GRAIN) * GRAIN
            if isinstance(self.model, Direct):
                held = DirectSession(self.model, batch, slots)
            else:
                from aerogel.kernels.decode.session import Session

                held = Session(self.model, batch, slots, self.windows)
            self.session = held
        return held


def _exact(session: Session | DirectSession, sampling: Sampling, steps: int) -> Iterator[list[int]]:
    step = session.stepper(sampling)
    for _ in range(steps):
        yield step()[:, 0].tolist()


def _ahead(session: Session | DirectSession, sampling: Sampling, steps: int) -> Iterator[list[int]]:
    """The next step is launched before the last one's tokens are read."""
    step = session.stepper(sampling)
    hosts = [torch.empty(session.batch, 1, dtype=torch.int64, pin_memory=True) for _ in range(2)]
    events = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
    for index in range(steps + 1):
        if index < steps:
            hosts[index % 2].copy_(step(), non_blocking=True)
            events[index % 2].record()
        if index > 0:
            events[(index - 1) % 2].synchronize()
            yield hosts[(index - 1) % 2][:, 0].tolist()


def left_padded(prompts: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """ids [B, T], 0 before short prompts, and the first place of each, int64 [B]."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
    start = torch.tensor([longest - len(prompt) for prompt in prompts])
    return ids.to(device), start.to(device)
