"""What an evaluation and a benchmark can be asked for: frozen, validated before any model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from aerogel.errors import BadInput

Numerics = Literal["stored", "float32"]
"""`stored`: compute in the data type of the checkpoint. `float32`: the stored weights, computed in fp32."""

Activations = Literal["stored", "int8"]
"""`stored`: rounded only where the checkpoint says so. `int8`: packed linears may round their inputs where that is faster."""


def positive(name: str, value: int) -> None:
    """Raise BadInput unless `value` is at least 1."""
    if value < 1:
        raise BadInput(f"{name} must be at least 1, found {value}: write a positive number")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise BadInput(f"{name} must be one of {', '.join(known)}, found {value!r}")


@dataclass(frozen=True, kw_only=True)
class QualitySettings:
    """What to measure about quality.

    perplexity: score the token windows. divergence: KL and top-1 against the dense model, on these same windows.
    tasks: lm-eval task names. limit: documents per task, a random subset drawn with `seed`; None means all of them.
    shots: examples in front of each task document. batch: windows and task requests per forward pass.
    activations: `int8` rounds the inputs of packed linears; the compressed model is then scored without that too, and the
    report says what it costs.
    """

    perplexity: bool = True
    divergence: bool = True
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    shots: int = 0
    seed: int = 0
    batch: int = 1
    numerics: Numerics = "stored"
    activations: Activations = "stored"

    def __post_init__(self) -> None:
        positive("evaluate.batch", self.batch)
        _one_of("evaluate.activations", self.activations, ("stored", "int8"))
        if self.limit is not None:
            positive("evaluate.limit", self.limit)
        if self.shots < 0:
            raise BadInput(f"evaluate.shots must not be negative, found {self.shots}: write 0 for zero-shot")
        if self.numerics not in ("stored", "float32"):
            raise BadInput(f"evaluate.numerics must be 'stored' or 'float32', found {self.numerics!r}")


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What to time: `repeats` interleaved repetitions after `warmup` for each batch size.

    prompt, new_tokens: tokens per sequence. loads: how often each model is loaded for the load time.
    loop: the decode loop, `auto` or one of `kernels.decode.loop.LOOPS`. merge: one linear for those that read the same
    input, in both models. seed: of the random prompt. activations: `int8` rounds the inputs of packed linears.
    """

    batch: tuple[int, ...] = (1,)
    prompt: int = 512
    new_tokens: int = 128
    repeats: int = 5
    warmup: int = 1
    loads: int = 3
    seed: int = 0
    loop: Literal["auto", "fused", "masked", "plain"] = "auto"
    merge: bool = True
    numerics: Numerics = "stored"
    activations: Activations = "stored"

    def __post_init__(self) -> None:
        if not self.batch:
            raise BadInput("bench.batch is empty: list at least one batch size, for instance [1, 16]")
        for value in self.batch:
            positive("bench.batch", value)
        for name in ("prompt", "repeats", "loads"):
            positive(f"bench.{name}", getattr(self, name))
        if self.new_tokens < 2:
            raise BadInput(f"bench.new_tokens must be at least 2, found {self.new_tokens}: decode speed needs a 2nd token")
        if self.warmup < 0:
            raise BadInput(f"bench.warmup must not be negative, found {self.warmup}")
        if self.loop not in ("auto", "fused", "masked", "plain"):
            raise BadInput(f"bench.loop must be 'auto', 'fused', 'masked' or 'plain', found {self.loop!r}")
        if self.numerics not in ("stored", "float32"):
            raise BadInput(f"bench.numerics must be 'stored' or 'float32', found {self.numerics!r}")
        _one_of("bench.activations", self.activations, ("stored", "int8"))
